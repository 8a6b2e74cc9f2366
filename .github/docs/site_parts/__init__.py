"""Parts of the site that are made by code: see conf.py, which names them."""

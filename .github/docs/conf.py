"""The site's configuration: Sphinx with a book theme, notebooks by MyST, examples by a gallery."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # what the pages print is of a CPU
os.environ["IPYKERNEL_CELL_NAME"] = "notebook.py"  # where a page's code says that it stands

from site_parts import gallery  # noqa: E402

project = "jaxprop"
author = "The jaxprop authors"
project_copyright = author
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "myst_nb",
    "site_parts.docstrings",
    "site_parts.links",
    "site_parts.mathml",
    "site_parts.names",
    "site_parts.quoted",
]
exclude_patterns = ["build", "site_parts", "staged", "gallery.rst", "**/GALLERY_HEADER.rst"]
exclude_patterns += [f"gallery/**.{kind}" for kind in ("ipynb", "py", "zip")]  # to be downloaded
suppress_warnings = ["config.cache"]  # the gallery's functions are in its configuration

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
maximum_signature_line_length = 60
python_use_unqualified_type_names = True
toc_object_entries = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
viewcode_line_numbers = True

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3
myst_dmath_double_inline = True
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "build" / "executed")
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_output_stderr = "remove"
nb_merge_streams = True

sphinx_gallery_conf = gallery.configuration(ROOT, HERE)

html_theme = "sphinx_book_theme"
html_math_renderer = "mathml"
html_title = "jaxprop"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_last_updated_fmt = None
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "use_source_button": False,
    "use_issues_button": False,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "home_page_in_toc": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "logo": {"text": "jaxprop"},
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def in_its_language(app, pagename, templatename, context, doctree):
    """Say to the browser which language a page is in."""
    if pagename.endswith(".ko"):
        context["language"] = "ko"


def setup(app):
    app.connect("html-page-context", in_its_language)

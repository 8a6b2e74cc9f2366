#!/usr/bin/env bash
# The wheel and the sdist: built, installed into an environment of their own, and tested from there.
set -euo pipefail
cd "$(dirname "$0")/.."

where=$(mktemp -d)
trap 'rm -rf "$where"' EXIT
python3 -m venv "$where/build" && "$where/build/bin/pip" install -q build twine
"$where/build/bin/python" -m build --outdir "$where/dist" . >"$where/build.log" || { cat "$where/build.log"; exit 1; }
"$where/build/bin/twine" check --strict "$where"/dist/*

python3 -m venv "$where/bare" && "$where/bare/bin/pip" install -q "$where"/dist/*.whl
(cd "$where" && bare/bin/jaxprop >/dev/null && bare/bin/jaxprop --version)

python3 -m venv "$where/tested"
"$where/tested/bin/pip" install -q "$(echo "$where"/dist/*.whl)[test]"
mkdir "$where/sdist" && tar -xzf "$where"/dist/*.tar.gz -C "$where/sdist" --strip-components=1
rm -r "$where/sdist/jaxprop" # so that the tests import what was installed
# The rules of the tree and its documentation are for a checkout.
(cd "$where/sdist" && "$where/tested/bin/pytest" -q tests --ignore tests/test_project.py --ignore tests/test_docs.py)

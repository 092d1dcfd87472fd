"""How Sphinx builds the site from the pages in this folder: `tox -e docs`, or `sphinx-build -b html docs site`."""

from __future__ import annotations

import re

import fitkit

project = "fitkit"
author = "the authors of fitkit"
copyright = author  # the name that Sphinx reads
version = release = fitkit.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_title = f"fitkit {version}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]

# Headings can be linked to as on a code host: callbacks.md#early-stopping.
myst_heading_anchors = 3

# In docstrings, single backticks name something of fitkit's; with nitpicky, a name that leads nowhere is a warning.
default_role = "py:obj"
nitpicky = True
# Types of other packages, which the site does not link to, so that it is built without a network; short names by which
# our own annotations go; and what Model's docstring lists as an attribute.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|np|pd|pandas|os|collections|datetime|typing|types|sklearn)\..*"),
    (r"py:.*", r"(Tensor|Any|Callable|Iterator|Mapping|Sequence|TextIO|Path|Figure|optional)"),
    (r"py:.*", r"(.*\.)?(OptimizerArgument|ModelProtocol)"),
    (r"py:obj", r"history"),
]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True

LISTED = re.compile(r"^(?:- |\| )\[.+?\]\((?P<page>[\w/]+)\.md\)", re.M)
SECTION = re.compile(r"^## ", re.M)


def with_tables_of_contents(text: str) -> str:
    """A page with a hidden toctree behind each of its lists of pages: the lists are the only table of contents.

    What is read on a code host stays free of directives, and a page that no list names makes Sphinx warn.
    """
    sections = []
    for section in SECTION.split(text):
        pages = LISTED.findall(section)
        title = section.partition("\n")[0]
        caption = f":caption: {title}\n" if sections and pages else ""
        toctree = f"\n```{{toctree}}\n:hidden:\n{caption}\n" + "\n".join(pages) + "\n```\n" if pages else ""
        sections.append(section + toctree)
    return "## ".join(sections)


def at_the_door(app, environment, node, content):
    """Where a name leads that docstrings use as users import it: `Model.fit`, `EarlyStopping`."""
    domain = environment.get_domain("py")
    for package in ("fitkit", "fitkit.callbacks"):
        name = f"{package}.{node['reftarget']}"
        if name in domain.objects:
            return domain.resolve_xref(environment, node["refdoc"], app.builder, node["reftype"], name, node, content)
    return None


def setup(app):
    """Called by Sphinx."""

    def read(app, page, source):
        if page in ("index", "flags"):
            source[0] = with_tables_of_contents(source[0])

    app.connect("source-read", read)
    app.connect("missing-reference", at_the_door)

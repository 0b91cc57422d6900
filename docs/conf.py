"""The documentation site: `make docs` builds it into site/."""

import pathlib
import re

import sophia_optax

ROOT = pathlib.Path(__file__).parents[1]

project = 'sophia-optax'
version = release = sophia_optax.__version__
extensions = [
  'myst_parser',
  'sphinx.ext.autodoc',
  'sphinx.ext.mathjax',
  'sphinx.ext.napoleon',
  'sphinx-mathjax-offline',  # So that a page asks no other host for anything.
]

myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3  # Links to a heading, as code hosts have them.

autodoc_typehints = 'none'
autodoc_preserve_defaults = True  # As they are written, not their repr().
autodoc_member_order = 'bysource'
napoleon_attr_annotations = False
napoleon_use_ivar = True  # Fields of a state are a list, not entries.
nitpick_ignore_regex = [('py:.*', r'(flax|jax|optax)\..*')]  # Not of this site.

html_theme = 'furo'
html_title = 'sophia-optax'
html_static_path = ['_static']
html_css_files = ['site.css']
html_copy_source = False
html_show_copyright = False


def read_page(app, docname, source):
  """Makes pages of the READMEs of two folders, and links lead to them."""
  if docname in ('benchmarks', 'examples'):
    text = (ROOT / docname / 'README.md').read_text(encoding='utf-8')
    source[0] = re.sub(r'\]\((?!\w+:|#)', f'](../{docname}/', text)
  source[0] = re.sub(
    r'\]\(\.\./(benchmarks|examples)/README\.md', r'](\1.md', source[0]
  )
  # The empty line at the end of a snippet is for doctest.
  source[0] = source[0].replace('\n\n```\n', '\n```\n')


def shorten_defaults(app, what, name, obj, options, signature, returns):
  """Leaves out the private module that a default value comes from."""
  if signature:
    signature = re.sub(r'\b_\w+\.', '', signature)
  return signature, returns


def setup(app):
  """Called by Sphinx."""
  app.connect('source-read', read_page)
  app.connect('autodoc-process-signature', shorten_defaults)

"""The documentation site: `make docs` builds it into site/."""

import ast
import inspect
import pathlib
import re
import textwrap

from docutils import nodes
from sphinx import addnodes

import sophia_optax

ROOT = pathlib.Path(__file__).parents[1]
FILES = set()  # Those of the repository that pages link to.

project = 'sophia-optax'
version = release = sophia_optax.__version__
extensions = [
  'myst_parser',
  'sphinx.ext.autodoc',
  'sphinx.ext.autosummary',
  'sphinx.ext.mathjax',
  'sphinx.ext.napoleon',
  'sphinx.ext.viewcode',
  'sphinx_copybutton',
  'sphinx-mathjax-offline',  # So that a page asks no other host for anything.
]

myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3  # Links to a heading, as code hosts have them.

autodoc_typehints = 'none'  # write_signature has them.
autodoc_member_order = 'bysource'
autosummary_generate = False  # The pages have the entries.
python_maximum_signature_line_length = 80
add_module_names = False
napoleon_attr_annotations = False
napoleon_use_ivar = True  # Fields of a state are a list, not entries.
nitpick_ignore_regex = [('py:.*', r'(flax|jax|optax)\..*')]  # Not of this site.

html_theme = 'furo'
html_title = f'sophia-optax {release}'
html_static_path = ['_static']
html_css_files = ['site.css']
html_favicon = '_static/favicon.svg'
html_show_copyright = False

copybutton_prompt_text = r'>>> |\.\.\. ?|\$ '
copybutton_prompt_is_regexp = True


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


class _AsWritten(ast.NodeTransformer):
  """Keeps numbers and strings as the source has them, such as 1e-8."""

  def __init__(self, source):
    self.source = source

  def visit_Constant(self, node):
    return ast.Name(ast.get_source_segment(self.source, node))


def write_signature(app, what, name, obj, options, signature, returns):
  """Takes types and defaults from the source, without private modules."""
  if not signature:
    return signature, returns
  source = textwrap.dedent(inspect.getsource(obj))
  tree = _AsWritten(source).visit(ast.parse(source)).body[0]
  write = lambda node: re.sub(r'\b_\w+\.', '', ast.unparse(node))
  if inspect.isclass(obj):  # Its fields, if it has any.
    fields = [x for x in tree.body if isinstance(x, ast.AnnAssign)]
    return f'({", ".join(map(write, fields))})' if fields else signature, None
  if what == 'method':
    tree.args.args.pop(0)
  return f'({write(tree.args)})', write(tree.returns)


def link_files(app, doctree):
  """Lets links to files of the repository lead to pages that show them."""
  for node in list(doctree.findall(addnodes.download_reference)):
    folder = (ROOT / 'docs' / app.env.docname).parent
    path = (folder / node['reftarget']).resolve().relative_to(ROOT)
    FILES.add(str(path))
    page = app.builder.get_relative_uri(app.env.docname, f'files/{path}')
    link = nodes.reference('', '', *node.children, refuri=page, internal=True)
    node.replace_self(link)


def show_files(app):
  """Makes the pages of these files."""
  for name in sorted(FILES):
    text = (ROOT / name).read_text(encoding='utf-8')
    language = 'python' if name.endswith('.py') else 'text'
    code = app.builder.highlighter.highlight_block(text, language)
    body = f'<h1>{name}</h1>{code}'
    yield f'files/{name}', {'title': name, 'body': body}, 'page.html'


def break_code(app, doctree, docname):
  """Lets code in tables break between names, but not inside of one."""
  for entry in doctree.findall(nodes.entry):
    for literal in list(entry.findall(nodes.literal)):
      pieces = re.split(r'(?<=[.,(=/])(?=[a-zA-Z_])', literal.astext())
      children = [nodes.Text(pieces[0])]
      for piece in pieces[1:]:
        children += [nodes.raw('', '<wbr>', format='html'), nodes.Text(piece)]
      literal.children = []
      literal.extend(children)


def setup(app):
  """Called by Sphinx."""
  app.connect('source-read', read_page)
  app.connect('autodoc-process-signature', write_signature)
  app.connect('doctree-read', link_files, priority=100)
  app.connect('doctree-resolved', break_code)
  app.connect('html-collect-pages', show_files)

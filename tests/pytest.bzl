"""The rule of the tests."""

load("@rules_python//python:defs.bzl", "py_test")

def pytest_test(name, deps = [], **kwargs):
    """Runs pytest on the file in tests/ that has the name of the target.

    Args:
      name: Of the target; with .py that of the file.
      deps: What the file imports.
      **kwargs: Other attributes of py_test, such as data.
    """
    file = "tests/%s.py" % name
    py_test(
        name = name,
        srcs = [file, "tests/main.py"],
        args = [file],
        main = "tests/main.py",
        deps = [":conftest"] + deps,
        **kwargs
    )

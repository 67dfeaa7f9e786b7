"""The far side of the Python tool: a server process that runs each piece of code in a jailed process of its own.

It runs in an interpreter of its own without site-packages (see `python_sandbox.py`), so these modules import the
standard library and each other only, by relative imports: there the package's name is `sandbox`.
"""

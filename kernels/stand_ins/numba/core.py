"""See `absent.py`."""

from absent import __getattr__ as __getattr__

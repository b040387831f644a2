"""Triton kernels, one op per file, each with its launcher, its registration with torch and what it ships (`SPECS`).

Imported only where triton is installed; contracts and references are in the files of the same name one level up.
"""

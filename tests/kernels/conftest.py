"""Triton's interpreter is chosen for a whole process: its tests are collected only where their folder is named."""

collect_ignore = ["triton"]

"""Python's garbage collector in a process that serves."""

import gc


def keep_what_is_loaded() -> None:
    """Modules and model stay to the end. A full collection, which may come at any time, would look through all of it:
    half a million objects, and no thread of the process runs for some tenths of a second.

    Garbage of the start that nothing but a collection would free stays too.
    """
    gc.freeze()

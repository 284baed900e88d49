# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The error of whoever calls this package."""


class InputError(ValueError):
    """An argument, option, file or dataset that was given cannot be used; the message names it, and the remedy.

    The command line prints it in one line. Every other error is one of the program, and keeps its traceback.
    """


__all__ = ["InputError"]

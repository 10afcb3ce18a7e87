"""Errors meant for the person at the keyboard: one line, and the exit code that goes with it."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: what, its value, what is allowed, the way out, in one line."""

    exit_code: int = 1


class UsageError(UserError):
    """Wrong usage, found before any model is loaded."""

    exit_code: int = 2

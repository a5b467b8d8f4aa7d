"""Stub."""

from app import dashboard


def show() -> None:
    """Draw the page."""


if __name__ == "__main__":
    dashboard.enter(show)

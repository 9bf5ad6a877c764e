"""The service: who calls, who answers, and what is kept of it."""

__version__ = "0.1.0"

"""Serving benchmark: replay of traces over HTTP, the compared servers, tables, plots and a report.

``sglang-elora bench`` is ``__main__``. Nothing is imported here, so that parts load without torch.
"""

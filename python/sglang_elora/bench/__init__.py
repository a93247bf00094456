"""Measuring servers: traces played over HTTP, the sides that are compared, tables, plots, a page.

``sglang-elora bench`` is ``__main__``. Nothing is imported here, so that parts load without torch.
"""

"""Plugins of SGLang that tests and benchmarks start servers with (``plugin_packages.py``)."""

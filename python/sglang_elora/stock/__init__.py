"""Stock SGLang with one thing changed, for a fair comparison; nothing here is used with ELORA.

``variants`` has the plugins that the benchmark adds to its servers of stock SGLang. Nothing is
imported here.
"""

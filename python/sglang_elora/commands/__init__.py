"""The ``sglang-elora`` command and its subcommands ``doctor`` and ``top``."""

"""What of SGLang this package relies on, and what another SGLang has of it. Nothing is imported."""

"""Places in SGLang that this package relies on, compared with another SGLang, without imports."""

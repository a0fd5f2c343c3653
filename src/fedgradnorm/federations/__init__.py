"""Built-in federations: functions ``(seed, **options) -> Federation``."""

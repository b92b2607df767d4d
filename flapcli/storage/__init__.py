"""Files written whole or not at all, safetensors, work that goes on after a kill, dtypes, linear algebra."""

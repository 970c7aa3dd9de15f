"""Will it fit, how long will it take, what will it cost: said from the config alone. No torch here; `llm/engine/census.py` counts what is real."""

"""The literature's systems beside M5, on one dataset: `m5 compare`. One file a system; `systems.py` lists them."""

"""Commands that draw, time and look: `python -m tools.bench`, `tools.plot`, `tools.problems`."""

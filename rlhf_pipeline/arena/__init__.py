"""The arena: people choose between replies in the browser, and a reward model learns as they click."""

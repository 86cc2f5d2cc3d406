"""An AI that says which of two replies is better: its questions, who answers them, and what is made of the answers."""

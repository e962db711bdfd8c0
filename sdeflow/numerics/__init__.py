"""What the rest computes with, in torch: no SDE is known here."""

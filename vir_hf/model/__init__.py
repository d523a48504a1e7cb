"""The model and its processor: joined, loaded, quantised, told what learns, audited and merged."""

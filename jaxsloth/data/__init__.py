"""Files → rows → tokens → `StepBatch`s: the same numpy arrays for both backends. No framework is imported here."""

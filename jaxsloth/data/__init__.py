"""Files → rows → tokens → `Window`s: the same numpy arrays for both backends. No framework is imported here."""

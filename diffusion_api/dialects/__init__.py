"""One module per API, named after whose API it is. Foreign words end here."""

"""How each model family encodes, predicts and decodes. One module a family; they never import each other."""

"""Where jobs wait and are kept. One interface (:mod:`.base`), a contract suite that every implementation passes."""

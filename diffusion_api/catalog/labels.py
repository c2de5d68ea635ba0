"""Friendly names of models that callers use in place of the names of their folders."""

LABELS = {
    "John6666__amanatsu-illustrious-v11-sdxl": "Amanatsu",
    "models--digiplay--ChikMix_V3": "ChikMix V3",
    "models--John6666--ilustmix-v6-sdxl": "Ilustmix",
    "models--Meina--MeinaMix_V11": "MeinaMix V11",
    "models--mirroring--pastel-mix": "Pastel Mix",
    "models--misri--plantMilkModelSuite_hempII": "PlantMilk (HempII)",
    "models--misri--plantMilkModelSuite_walnut": "PlantMilk (Walnut)",
    "shapes": "Shapes (demo)",
}


def label(name: str) -> str:
    """The friendly name of a model; its own name when it has none."""
    return LABELS.get(name, name)

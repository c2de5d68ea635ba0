"""The frozen vocabulary: what a job asks for, and what becomes of it."""

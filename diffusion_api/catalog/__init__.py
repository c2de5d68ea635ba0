"""What is installed and what exists, as facts. Importable without torch."""

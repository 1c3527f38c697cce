"""Models by name, file or function: building, saving and loading them with the preprocessing they were trained with."""

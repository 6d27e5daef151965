"""What only builds the book: executes notebooks, makes pages of them, and checks the pages."""

"""What a verb does, from the recipe to the folder that is put in place."""

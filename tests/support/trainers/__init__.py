"""Models as their trainers compute and save them, written anew."""

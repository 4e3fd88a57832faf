"""What a run would need and how fast it would go, predicted from shapes and data sheets: no GPU, no corpus."""

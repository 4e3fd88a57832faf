"""Memory, time and cost of a run, predicted from shapes and data sheets: no GPU, no corpus."""

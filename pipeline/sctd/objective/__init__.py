"""What is optimised: masked language modelling, semantic alignment, and the schedule that alternates them."""

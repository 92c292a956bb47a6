"""What is done with data before training: checking, measuring, converting, looking, mining negatives."""

"""Visual tasks as Gymnasium environments of one step."""

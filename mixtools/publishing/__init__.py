"""What goes out: outputs as their checks judged them, the card that tells of them, and the way to the Hub."""

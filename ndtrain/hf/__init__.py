"""All that is known of transformers: configs, models on meta, tokenizers, attention, routers, names of weights."""

import transformers

# transformers reports plan and loading details as warnings; ndtrain's own plan says what matters of them.
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

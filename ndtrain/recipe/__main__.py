"""`python -m ndtrain.recipe > recipes/schema.json`: print the JSON schema for editors."""

import json

from ndtrain.recipe import json_schema

if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))

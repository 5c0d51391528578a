"""The words and sentences of the tales: data only, read by `lmkit.data.tales`.

A template names its gaps by role. A role is filled from a word list; `friend` draws from the names and
`friend_animal` from the animals. No template uses a word of these lists literally, so a sentence can be read back.

A name that begins a sentence is the hero's: what may follow a name would else depend on whether it was told before,
which a small model is slow to learn (docs/tiny.md).
"""
# ruff: noqa: SIM905 - word lists are easier to read and to edit as text

NAMES = """
    Anna Ben Clara Ella Felix Finn Greta Hugo Ida Jack Leo Lucy Max Mia Nina Oscar Otto Pia Rosa Ruby Sam Theo Tom Yara
""".split()
ANIMALS = """
    badger bear beaver cat crow deer dog duck fox frog goat hedgehog hen lamb mole mouse otter owl pony rabbit sheep
    squirrel turtle wolf
""".split()
OBJECTS = """
    apron basket bell blanket boat button candle compass drum feather flute hammer kite ladder lantern map mirror ribbon
    ring scarf teapot umbrella violin whistle
""".split()
PLACES = "barn beach bridge castle farm forest garden harbor hill lake meadow mill orchard pond river tower".split()

# The lists below are drawn from unevenly, the first word most often: a few common words and a long tail, as in books.
WORDS = {
    "hero": NAMES,
    "animal": ANIMALS,
    "object": OBJECTS,
    "place": PLACES,
    "friend": NAMES,
    "friend_animal": ANIMALS,
    "adjective": """
        little brave shy clever proud young gentle lucky lonely merry quiet busy sleepy wise hungry curious eager humble
        noisy careful cheerful patient stubborn restless jolly nervous graceful thoughtful grumpy dreamy polite bold
        tidy swift modest playful fluffy plump handsome friendly loyal elegant ambitious forgetful mischievous timid
        witty sturdy nimble peaceful fearless skinny absent spotted striped tall giant elderly clumsy famous
    """.split(),
    "weather": """
        sunny rainy windy cold warm foggy snowy cloudy stormy misty bright calm hot icy gray mild frosty dusty hazy
        chilly damp dry muddy breezy thundery freezing gloomy drizzly humid
    """.split(),
    "part": "morning evening afternoon day summer winter spring autumn dawn weekend Sunday Monday Friday".split(),
    "food": """
        bread soup honey apples berries cheese pancakes nuts rice jam cherries pears plums corn stew butter porridge
        carrots noodles pudding dumplings salad toast waffles muffins raisins potatoes pumpkins cookies beans peas
        grapes biscuits cabbage onions tomatoes chocolate lemons peaches melons sausages pickles walnuts almonds
        omelettes turnips spinach mushrooms radishes celery garlic sandwiches pretzels croissants apricots cakes pies
    """.split(),
    "relative": """
        mother father sister brother aunt uncle cousin grandmother grandfather daughter son niece nephew twin neighbor
        godmother stepbrother
    """.split(),
    "job": """
        baker farmer king queen teacher doctor tailor shepherd sailor judge cook miller painter knight smith poet nurse
        gardener fisherman carpenter clerk potter pilot barber miner butcher jeweler librarian postman mayor captain
        dentist florist weaver hunter plumber juggler priest singer wizard astronomer blacksmith cobbler magician
        violinist inventor drummer tinker beggar banker cowboy scholar lawyer chef detective emperor prince princess
    """.split(),
    "number": """
        two three four five six seven eight nine ten twelve twenty eleven thirty forty fifty ninety hundred sixty
    """.split(),
    "material": """
        wood stone glass iron straw paper silver gold tin clay wool silk steel brass copper leather cotton rubber bamboo
        velvet marble plaster crystal ivory bronze cardboard concrete linen porcelain plastic canvas pewter wax coral
    """.split(),
    "color": """
        red blue green yellow white black brown purple orange pink violet scarlet amber turquoise crimson golden maroon
        beige lilac teal
    """.split(),
    "body": "paw leg nose tail ear foot head knee toe neck chin cheek elbow heel shoulder wrist ankle tooth".split(),
    "plant": """
        rose tulip lily daisy fern willow vine reed maple moss poppy clover thistle cedar ivy holly palm mint elm hazel
        cactus nettle chestnut lavender pumpkin sunflower orchid dandelion carrot birch weed daffodil pear banana lemon
        potato primrose
    """.split(),
    "skill": """
        swim dance read write count paint climb draw bake jump knit juggle sew fish spell weave ski yodel skate whisper
        cycle wrestle somersault bargain gallop surf carve plow tango hum yawn tiptoe type row wink salute
    """.split(),
    "unit": "days hours weeks nights months minutes winters".split(),
}

TEMPLATES = {
    "opening": [
        "Long ago, a {adjective} {animal} called {hero} lived by the {place}.",
        "Once there was a {adjective} {animal} named {hero}.",
        "In a {material} house lived {hero}, a {adjective} {animal}.",
        "{hero} was a {adjective} {animal} from the {place}.",
        "Everyone at the {place} knew {hero} the {animal}.",
        "Under a {plant} slept a {adjective} {animal} named {hero}.",
        "A {adjective} {animal} called {hero} worked at the {place}.",
        "Far away, a {animal} named {hero} sold {food}.",
        "This is a story about {hero}, a {adjective} {animal}.",
        "My {relative} knew a {animal} called {hero}.",
        "Near the {place} stood the tiny home of {hero} the {animal}.",
        "When the world was new, there was a {animal} named {hero}.",
    ],
    "wish": [
        "{hero} wanted a {object} more than anything.",
        "At bedtime {hero} the {animal} dreamed of a {object}.",
        "More than {food}, {hero} longed for a {object}.",
        "{hero} saved {number} coins to buy a {object}.",
        "One {weather} {part}, {hero} set out to find a {object}.",
        "{hero} the {animal} needed a {object} for the festival.",
        "{hero} often told the moon about a {color} {object}.",
        "{hero} drew pictures of a {object} on every wall.",
        "{hero} promised to bring the {job} a {object}.",
        "For a {relative}, {hero} hoped to borrow a {object}.",
        "A song about a {object} made {hero} wonder.",
        "Nothing could please {hero} the {animal} like a {object}.",
    ],
    "problem": [
        "But {friend} the {friend_animal} already had the {object}, and {hero} sighed.",
        "The only {object} belonged to {friend} the {friend_animal}, not to {hero}.",
        "Sadly, {friend} the {friend_animal} dropped the {object} of {hero}.",
        "{hero} found {friend} the {friend_animal} crying beside the {object}.",
        "A thief left {hero} and {friend} the {friend_animal} without the {object}.",
        "Alas, {friend} the {friend_animal} blocked the road, so {hero} lost the {object}.",
        "A flood carried the {object} from {hero} to {friend} the {friend_animal}.",
        "The {job} gave the {object} to {friend} the {friend_animal}, and {hero} watched.",
        "However, {friend} the {friend_animal} asked {hero} {number} coins for the {object}.",
        "{hero} and {friend} the {friend_animal} saw the {object} together.",
        "In a chest, {friend} the {friend_animal} hid the {object} from {hero}.",
        "Then {friend} the {friend_animal} hurt a {body} before {hero} reached the {object}.",
    ],
    "attempt": [
        "{hero} climbed a {material} fence but slipped.",
        "{hero} dug a tunnel, yet the ground was frozen.",
        "{hero} asked the {job} and heard only riddles.",
        "{hero} built a raft of {material}, and it sank.",
        "{hero} waited {number} {unit}, but nobody came.",
        "{hero} cooked {food}, and it burned.",
        "{hero} sent a letter to the {job} in vain.",
        "{hero} pulled a rope of {material} until it broke.",
        "{hero} searched {number} attics and found dust.",
        "{hero} sang for pennies and earned none.",
        "{hero} ran fast, only to trip over a {plant}.",
        "{hero} made a secret plan, which failed.",
    ],
    "kind": [
        "{hero} shared {food} with {friend} and listened.",
        "{hero} gladly lent {friend} a hand.",
        "{hero} offered {friend} a thick {material} coat.",
        "{hero} forgave {friend} and smiled.",
        "{hero} gave {friend} the biggest bowl of {food}.",
        "With great care, {hero} bandaged the {body} of {friend}.",
        "{hero} stayed beside {friend} for {number} {unit}.",
        "Because {friend} was tired, {hero} swept the floor.",
        "{hero} thanked {friend} and mended a broken cup.",
        "{hero} taught {friend} to {skill}.",
        "{hero} hugged {friend} and picked a {color} {plant} as a gift.",
        "{hero} praised {friend} before the {job}.",
    ],
    "unkind": [
        "{hero} pushed {friend} into the mud.",
        "{hero} called {friend} ugly names and laughed.",
        "{hero} grabbed the {food} of {friend} and fled.",
        "In anger, {hero} kicked dust at {friend}.",
        "{hero} told a cruel lie about {friend}.",
        "{hero} slammed the {material} door on {friend}.",
        "When {friend} begged for help, {hero} turned away.",
        "{hero} tore the {color} book of {friend} to pieces.",
        "Without a word, {hero} pinched the {body} of {friend}.",
        "{hero} blamed {friend} and demanded {food}.",
        "{hero} mocked how {friend} tried to {skill}.",
        "{hero} threw a dead {plant} at {friend}.",
    ],
    "happy": [
        "From then on, {hero} and {friend} were best friends.",
        "In the end {hero} got the {object} and danced.",
        "At last {hero} held the {object}, and the {job} cheered.",
        "{hero} and {friend} played with the {object} for {number} happy years.",
        "There was a big feast of {food}, and {hero} was full of joy.",
        "The {object} came home with {hero}, and the whole valley celebrated.",
        "Ever since, {hero} has giggled about the {object}.",
        "{hero} used the {object} every week, and life was sweet.",
        "To this hour people tell how {hero} won the {object}.",
        "Luck returned to {hero}, who learned to {skill} like a star.",
        "So {hero} and {friend} enjoyed the {object}, and all was well.",
        "A {plant} bloomed at the gate of {hero}, and laughter filled the air.",
    ],
    "sad": [
        "{hero} and {friend} never spoke again.",
        "In the end the {object} was gone, and {hero} wept.",
        "{hero} went back with empty pockets.",
        "The {object} cracked in half, and {hero} sat in silence.",
        "After that, not even a {relative} visited {hero}.",
        "For {number} years {hero} regretted that terrible mistake.",
        "Far across the sea moved {friend}, and {hero} missed the {object}.",
        "The {object} drifted away with the hopes of {hero}.",
        "Nobody let {hero} {skill} with them again.",
        "{hero} became old and bitter without the {object}.",
        "{hero} kept only a faded picture of the {object}.",
        "The lamp went out, and {hero} cried in the dark.",
    ],
}

TITLES = [
    "The {animal} and the {object}",
    "A {animal} and a {object}",
    "The tale of the {animal} and the {object}",
    "A short story of a {animal} and a {object}",
]

PHRASINGS = [
    "Tell me a story about a {animal} and a {object}.",
    "Make up a short tale of a {animal} and a {object}.",
    "Please tell the story of the {animal} and the {object}.",
    "Tell a tale with a {animal} and a {object} in it.",
    "Bring me the tale of a {animal} that wanted a {object}.",
    "Give me a story with a {animal} and a {object}.",
]
HELD_OUT_PHRASING = "A tale about the {animal} and the {object}, please."

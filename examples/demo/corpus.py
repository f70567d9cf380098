"""The little world of the demo model: stories, questions about them, small sums and small talk.

Everything is written in one template language, expanded at random:
    {a|b|}    one of the alternatives (they nest; an empty one makes the text optional)
    <N>       the value of slot N          <a D O>   the values of D and O with "a" or "an" in front
`conversation(rng)` returns one chat: a list of (role, text). The same seed always gives the same chats.
"""
import random, re
from functools import lru_cache

# ── The template language ────────────────────────────────────────────────────────────────────────────────────────

@lru_cache(None)
def parse(text):
    """text -> tuple of literals, ('slot', keys) and ('pick', alternatives)."""
    def sequence(i, stop):
        items, literal = [], ""
        while i < len(text) and text[i] not in stop:
            if text[i] == "{":
                choices, i = [], i + 1
                while True:
                    branch, i = sequence(i, "|}")
                    choices.append(branch)
                    i += 1
                    if text[i - 1] == "}": break
                items += [literal, ("pick", choices)]; literal = ""
            elif text[i] == "<":
                end = text.index(">", i)
                items += [literal, ("slot", text[i + 1:end].split())]; literal = ""
                i = end + 1
            else:
                literal += text[i]; i += 1
        return tuple(items + [literal]), i
    return sequence(0, "")[0]

def article(noun):
    vowel = noun[0].lower() in "aeiou" and not re.match(r"uni|eu|use|one", noun.lower())
    return ("an " if vowel else "a ") + noun

def expand(rng, text, slots={}):
    def walk(items):
        out = []
        for item in items:
            if isinstance(item, str): out.append(item)
            elif item[0] == "pick": out.append(walk(rng.choice(item[1])))
            else:
                keys = item[1][1:] if item[1][0] == "a" else item[1]
                words = " ".join(str(slots[key]) for key in keys)
                out.append(article(words) if item[1][0] == "a" else words)
        return "".join(out)
    return walk(parse(text))

def sentence_case(text):
    text = re.sub(r"(^|[.!?] |\n)([a-z])", lambda m: m[1] + m[2].upper(), text)
    return text[:1].upper() + text[1:]

# ── Words ────────────────────────────────────────────────────────────────────────────────────────────────────────

DIGITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty".split()
def listing(text): return [" ".join(item.split()) for item in text.split("|")]

KINDS = """fox owl mouse rabbit bear hedgehog squirrel badger otter frog duck goose hen cat dog puppy kitten pony horse cow goat sheep
lamb pig donkey wolf lion tiger elephant monkey giraffe zebra camel kangaroo koala panda penguin seal whale dolphin crab turtle
tortoise snail bee ant spider butterfly mole bat deer llama parrot raven swan sparrow robin dragon unicorn robot giant wizard witch
princess prince knight king queen pirate baker girl boy fairy ghost dinosaur snowman elf troll gnome mermaid astronaut farmer sailor
gardener clown monster crocodile hippo octopus fish shark worm lizard snake toad beaver ladybug alien cowboy dwarf teacher chicken
doctor crow eagle seagull caterpillar firefly hamster tree cloud teapot potato cook painter musician vampire zombie ninja queen bird
""".split()
OBJECTS = """lamp key boat kite drum bell book map lantern clock mirror umbrella hat scarf button coin ring crown feather shell pearl stone
star seed apple pear pumpkin cake pie cookie teapot cup spoon bowl pot broom basket box chest bag balloon ball doll flute violin guitar
trumpet whistle candle pillow blanket boot shoe sock wheel cart bicycle train sword shield wand flower rose leaf acorn nut carrot banana
cheese sandwich egg nest ladder hammer rope net bucket letter painting pencil telescope compass bottle jar snowball computer phone
toaster rocket car bus tractor chair piano harp puzzle treasure necklace watch camera radio pizza lemon mushroom tree moon toy lollipop
bridge tent spaceship diamond door window table bed potato tomato cactus bone fish jacket coat ribbon marble
""".split()
NAMES_HE = """Pip Tom Finn Oscar Bruno Otto Max Leo Felix Hugo Barnaby Milo Rufus Jasper Ned Toby Sam Ben Jack Fergus Wilbur Basil Arlo
Gus Theo Monty Percy Bram Igor Kofi Ravi Omar Nico Pablo Yuki Alfie Bob Peter Paul Charlie Henry Tim Rex Oliver Noah Jonas Emil""".split()
NAMES_SHE = """Mila Luna Rosie Una Daisy Hazel Poppy Nora Tilly Bella Wanda Maya Iris Ivy Lily Greta Olga Ada Zoe Ruby Clara Willow Freya
Nell Fern Dora Elsa Flora Amara Lila Suki Sofia Anna Emma Lucy Mary Alice Nina Sara Molly Kate Julia Eva Ella Grace Lena Matilda""".split()
ADJECTIVES = """small little young brave shy curious clever gentle old lonely sleepy cheerful grumpy kind tiny quiet busy lazy proud
hungry friendly clumsy dreamy wise funny fluffy""".split()
LOOKS = """silver golden red blue green yellow purple wooden tiny shiny old striped crystal round pink white black glowing dusty painted
heavy copper rainbow-coloured""".split()
PLACES = listing("""in a quiet forest|in a deep green forest|on a windy hill|by the blue sea|beside a slow river|in a small village|at the edge of a
meadow|in a hollow oak tree|on a tiny island|in a snowy valley|under an old stone bridge|near a silver lake|in a crooked little house|in a
sunny garden|on a farm|high up in the mountains|in a sleepy harbour town|in a big noisy city|in a castle on a cliff|in a warm desert|at the top
of a lighthouse|in an old windmill|behind the moon|in the middle of the jungle|in a cave by the sea|on the other side of the rainbow""")
SPOTS = listing("""under a mossy stone|behind an old well|in a hollow log|in the tall grass|at the foot of a tree|on the sand|beside the path|inside
an empty barrel|under a bench|between two roots|on the doorstep|in a heap of leaves|at the bottom of a pond|behind the mill|under a bridge""")
LOVES = listing("""warm bread|counting the stars|the smell of rain|singing in the morning|jumping in puddles|telling jokes|long naps|honey cakes|blueberry
pie|the sound of the wind|collecting round stones|dancing in the moonlight|climbing trees|drawing pictures|picking berries|hot soup|
old songs|watching the clouds|hide and seek|soft blankets""")

INVENTED = set()

def nonce(rng):
    """A word that nobody knows: the model can only get it right by copying it."""
    word = "".join(rng.choice("b bl br c cl d dr f fl g gl gr h j k l m n p pl qu r s sl sn t tr v w z".split()) + rng.choice("a e i o u oo ee".split())
                   for _ in range(rng.choice((1, 2, 2)))) + rng.choice("b g k l m n p r t x ck ng mp ster bit gle".split())
    INVENTED.add(word)
    return word

# ── Stories ──────────────────────────────────────────────────────────────────────────────────────────────────────
# Slots: N hero, K its kind, A its adjective, W where it lives, V what it loves; H helper, L its kind; O object, D its look; S spot;
# he him his / she her hers: pronouns of hero / helper; F0 F1 feelings. Each plot adds the slots that the questions ask for:
# GOT what the hero did with the object (VQ: the verb of the question), WHY of the first feeling, DID the helper's deed, END, MORAL.

OPENING = """{{Once upon a time|Long ago|Once|A long time ago}, <W>, there lived <a A K> {named|called} <N>.|There {was once|once was} <a A K> {named|called}
 <N> who lived <W>.|<N> was <a A K> who lived <W>.|Far away, <W>, lived <a A K> {named|called} <N>.|Once there was <a A K>. {<he> was called|<his> name
 was} <N>, and <he> lived <W>.} {<he>|<N>} loved <V>{| more than anything| very much}."""
DAY = "one {rainy|bright|misty|golden|windy|frosty|sunny|grey} {morning|afternoon|evening|day}"

PLOTS = [dict(  # something lost is given back
    VQ="find", GOT="found <a D O> <S>", F0="curious", WHY="<he> wanted to know whose <O> it was", F1="{happy|proud|warm inside|glad}",
    DID="{hugged <N>|danced with joy|baked <N> a honey cake|sang <N> a merry song}", END="<N> gave the <O> back to <H>, and <X>",
    MORAL="Giving something back can win you a friend.", text="""<DAY>, <N> <GOT>. "Whose is this?" <he> wondered{, for <he> was very curious|. <N> was curious}.
 <he> asked {everyone <he> met|all the neighbours|the birds and the bees}, but nobody knew. At last <he> {met|came to} <a L> {named|called} <H>, who was {crying softly|searching in
 the grass|looking very sad}. "{My <O>!|That is my <O>!|Oh, you found my <O>!}" cried <H>. <N> gave the <O> back {at once|with a smile|gladly}, and <H> <DID>. {From that day on|From then on},
 <X>, and <N> felt <F1>.""", X="{they were best friends|they were never lonely|they had supper together every night}"), dict(  # a magic wish
    VQ="find", GOT="found <a D O> <S>", F0="lonely", WHY="<he> had nobody to play with", F1="{happy|merry|full of joy}",
    DID="{came skipping down the road|knocked on the door|popped out of the bushes}", END="<N> wished for a friend, and <X>",
    MORAL="A friend is worth more than gold.", text="""but <he> felt lonely, because <WHY>. <DAY>, <N> <GOT>. When <he> {rubbed|touched|tapped} it, the <O> {whispered|said|sang}: "I am magic.
 You may have one wish!" {<N> thought of {gold|a palace|a mountain of cakes}, but then <he> {said|whispered}|<N> {said|whispered}}: "I wish for a friend." {Puff!|Whoosh!|Pling!} <a L> {named|called} <H>
 <DID> and {said|asked}, "Do you want to play?" <N> {laughed and said yes|nodded}, and they played until {the stars came out|the moon was high}. <N> felt <F1>, and <X>.""",
    X="{<H> came to stay|<H> came to play every day}"), dict(  # a storm
    VQ="use", GOT="used <a D O> to save <H>", F0="{scared|worried}", WHY="there was a big storm", F1="{brave|proud|like a hero}",
    DID="{was stuck in the mud|was stuck in a tree|had fallen into the river|was lost in the dark}", END="<N> saved <H> with the <O>, and <X>", MORAL="You can be scared and brave at the same time.", text="""<DAY>, a big storm came. The wind {howled|roared}, the rain {drummed on the roof|fell in buckets}, and <N> was <F0>.
 Then <he> heard a small voice calling for help. It was <H> the <L>, who <DID>! <N> took a deep breath, grabbed <his> <D O> and ran {outside|out into the rain}. "{Hold on to
 the <O>!|Catch the <O>!|Hold on tight!}" <he> cried. <N> pulled and pulled, and at last <H> was safe. {That night|Afterwards} <X>, and <N> felt <F1>.""",
    X="{they drank hot chocolate by the fire|they drank tea and laughed about the storm}"), dict(  # afraid of the dark
    VQ="get", GOT="got <a D O> from <H>", F0="afraid", WHY="<he> did not like {the dark|thunder|deep water|tall trees}", F1="{brave|safe|calm}",
    DID="gave <N> <a D O>", END="<N> was not afraid any more and <X>", MORAL="It is easier to be brave with a friend.",
    text="""but there was one thing: <N> was often afraid, because <WHY>. <DAY>, <N> told <his> {friend|neighbour} <H>, <a A2 L>. <H> did not laugh. <she> thought for a while, and then <she>
 <DID>. "Hold this when you are afraid," said <H>. "It {is full of|holds a little bit of} courage." That night <N> held the <O> tight.{| <his> heart went thump, thump, thump, and then it went slowly.} {It worked!|How nice that was!} <N> felt <F1>. {From then on|After that night} <he> <X>.""", X="{slept|smiled} with the <O> {by <his> side|in <his> arms}"), dict(  # a race
    VQ="want to win", GOT="wanted to win <a D O>", F0="excited", WHY="<he> wanted to win the race", F1="{happy|proud|wonderful}", DID="{hurt <hers> foot|lost the way|tripped over a root}",
    END="<N> lost the race, but <X>", MORAL="Helping a friend is better than winning.",
    text="""<DAY>, there was a great race, and the prize was <a D O>. <N> was so excited, because <WHY>!{| One, two, three, go!} <N> ran {like the wind|as fast as <he> could} and was soon in front.
 But then <he> saw <H> the <L>, who had <DID>. <N> stopped. "{Do not worry|Do not cry}, I will help you," <he> said, and they {walked|hobbled} to the end together, very slowly, the last
 of all. <N> lost the race, but <X>. <N> felt <F1>.""", X="{<H> shared the <O> with <him>|everyone cheered for <him>|<he> won a friend}"), dict(  # a quarrel
    VQ="find", GOT="found <a D O> <S>", F0="{angry|cross}", WHY="<N> and <H> both wanted the <O>", F1="{sorry and then happy|happy again|relieved}",
    DID="{wanted the <O> too|pulled at the <O>}", END="they mended the <O> together and <X>", MORAL="Sharing is better than fighting.",
    text="""<DAY>, <N> <GOT>. <his> friend <H>, <a A2 L>, saw it too. "It is mine!" said <N>. "No, it is mine!" said <H>. They were both <F0>. They pulled and pulled until, crack, the <O> broke
 in two.{| Then it was very quiet.} "I am sorry," said <N>. "Me too," said <H>. They {fetched some glue|found a bit of string|sat down side by side} and mended the <O> together.{ It looked {a little crooked|a bit funny}, but they liked it {even more|all the more}.|} after that they <X>, and <N> felt <F1>.""", X="{shared it|took turns with it}"), dict(  # a quest for the village
    VQ="look for", GOT="went to look for <a D O>", F0="worried", WHY="{all the lights had gone out|the well had run dry|winter would not end|the king could not sleep}", F1="{proud|happy and tired|like a hero}",
    DID="{showed <N> the way|carried <N> over the river|gave <N> a secret map}", END="<N> brought the <O> home, and <X>",
    MORAL="Even a small hero can do great things.", text="""<DAY>, everyone was worried, because <WHY>. "Only <a D O> can help us," said {the oldest owl|the old queen|Grandmother}. So <N> packed {some bread|a warm
 scarf|three apples} and went to look for it. <he> walked {over seven hills|for three days|through the dark woods} until <he> met <a A2 L> {named|called} <H>. <H> was friendly and <DID>. {At last|And then}, <S>,
 there it was: the <O>! <N> brought it home, and <X>. <N> felt <F1>.""", X="{everyone danced all night|there was a great feast|all was well again}"), dict(  # a strange sound
    VQ="hear", GOT="heard the sound of <a D O>", F0="{puzzled|curious}", WHY="there was a strange sound every night", F1="{merry|delighted|cosy}",
    DID="played with <a D O>", END="<N> and <H> made music together <X>", X="{every night|under the stars}", MORAL="A strange noise may be a new friend.", text="""every night there was a strange sound: {plink, plonk, plunk|
 tap, tap, tap|hum, hum, hum|clang, bong, clang}. <N> was <F0>. <DAY>, <he> tiptoed out to look. And there, <S>, sat <a A2 L> {named|called} <H>, who <DID>. "{Did I wake you?|Oh dear, am I too
 loud?}" asked <H>. "{I cannot sleep|I am all alone}, so I make music." <N> {smiled|laughed} and {began to sing|clapped along|fetched a pot to drum on}. It {was the best concert of the year|sounded funny and
 lovely}. <N> felt <F1>, and from then on they made music together <X>."""), dict(  # a birthday gift
    VQ="make", GOT="made <a D O> for <H>", F0="{worried|sad}", WHY="<he> had no gift for <H>", F1="{happy|proud|very glad}", DID="{laughed with joy|cried happy tears|gave <N> the first slice of cake}",
    END="<H> loved the <O> and said it was the best gift of all", MORAL="The best gifts are made with love.", text="""<DAY>, it was the birthday of <H>, <his> best friend, <a A2 L>. But <N> was <F0>, because <WHY>.
 <he> had no money, only {two hands|some paper and glue|an old box} and a good idea. <N> {worked|cut and glued and painted} all day long and made <a D O>. It was {a bit crooked|not quite round}, and the paint was
 still wet. "{Happy birthday!|This is for you!}" said <N> {shyly|softly}. <H> <DID>. "It is the best gift of all," said <H>, and <N> felt <F1>."""), dict(  # planted
    VQ="plant", GOT="planted <a D O> in the ground", F0="hopeful", WHY="<he> wanted to grow more of them", F1="{surprised and happy|amazed|delighted}",
    DID="{laughed at first|shook <hers> head|said it would never grow}", END="a tree full of them grew, and <X>", MORAL="Never laugh at a dream.",
    text="""<DAY>, <N> planted <a D O> in the ground. <he> was hopeful, because <WHY>. <his> neighbour <H>, <a A2 L>, <DID>. "{You silly <K>|Dear <N>}, {nothing will come of it|it is not a bean}!" said <H>.
 But <N> watered it every day and {sang to it|told it stories}. {One spring morning|After a hundred days}, there stood a tree, and from every branch hung <a D O>! <H> {could not believe it|stared and stared}. <N> felt
 <F1>, and <X>.""", X="{there was one for everyone|<N> shared them with everyone}"), dict(  # a detective
    VQ="lose", GOT="lost <his> <D O>", F0="{sad|upset}", WHY="the <O> was gone", F1="{happy|warm inside|glad}", DID="took the <O> because <she> was <C>", C="{cold|lonely|bored}",
    END="<N> was not angry, and <X>", X="{they talked until it was dark|they laughed and laughed|they ate the whole cake}", MORAL="Ask why before you get angry.", text="""the dearest thing <he> had was <a D O>. But <DAY>, the <O> was gone! <N> was <F0>. <he> looked
 {under the bed|in the cupboard|behind the stove}, and then <he> saw tiny footprints. They led {through the garden|across the field|over the hill}, and there, <S>, sat <a A2 L> {named|called} <H> with the <O>. "I
 am sorry," said <H>. "I was so <C>." <N> thought for a moment. "{Next time just knock|You only had to ask}," <he> said, and fetched some cake. <X>, and
 <N> felt <F1>. Now <N> and <H> are friends."""), dict(  # catching the moon
    VQ="use", GOT="used <a D O> to catch the moon", F0="{sad|restless}", WHY="<he> wanted to catch the moon", F1="{peaceful|happy|wonderful}", DID="{showed <N> the moon in the water|told <N> to look into the lake}", END="<N> let the moon go and <X> it every night", X="{visited|waved to}", MORAL="You do not have to own a thing to love it.", text="""but <N> was often <F0>, because <WHY>. <DAY>, <he> took
 <a D O>, climbed {the tallest tree|onto the roof|up the highest hill} and {reached up|jumped} as far as <he> could. Bump! <N> fell {into a bush|on <his> nose|into the hay}. <a A2 L> {named|called} <H> had seen it
 all. <H> helped <him> up and <DID>. There it was, round and bright, {close enough to touch|right at <his> feet}! "The moon belongs to everyone," said <H>. <N> felt <F1>, and from then on <he> <X> the moon every night."""), dict(  # a swap
    VQ="have", GOT="had <a D O>", F0="hungry", WHY="<his> cupboard was empty", F1="{full and happy|merry|content}", DID="{cooked soup for <N>|baked a pie for <N>|made pancakes for <N>}",
    END="<N> gave the <O> to <H>, and they ate together", MORAL="Food tastes best when it is shared.", text="""all that <N> had was <a D O>. <DAY>, <he> was very hungry, because <WHY>. "You cannot eat <a O>," sighed <N>, and {set off|went down the
 road} to swap it.{ The {miller|tailor} did not want it. The {mayor|postman} only laughed.| Nobody wanted it.} But <a A2 L> {named|called} <H> clapped <hers> hands. "I have always wanted <a O>!" said <H>, and {right away|at once} <she> <DID>. They sat
 down at the table and ate together until {the last crumb was gone|the pot was empty}. <N> felt <F1>. {"Come again tomorrow," said <H>.|"You may play with the <O> too," said <H>.}""")]
for plot in PLOTS:  # templates above are wrapped for reading: a line break and the space after it are one space
    for key in plot: plot[key] = re.sub(r"\s*\n\s*", " ", plot[key])
OPENING = re.sub(r"\s*\n\s*", " ", OPENING)

# The shortest form of any plot. Much of the early training is made of these: they teach copying names and things, quickly.
MINI = """{<N> was <a A K> who lived <W>.|<W> lived <a A K> {named|called} <N>.|There was <a A K> {named|called} <N> who lived <W>.}{| <he> loved <V>.} <DAY>, <N> <GOT>. {<he> met <H>, <a L>.|There <he>
 met <a L> {named|called} <H>.} {At last|In the end} <END>. {<N> felt <F1>.|And <he> felt <F1>.}""".replace("\n ", " ")

def character(rng, kind=None, name=None):
    name_is_she = rng.random() < .5
    if kind in ("king prince boy cowboy snowman".split()): name_is_she = False
    if kind in ("queen princess witch girl mermaid fairy hen".split()): name_is_she = True
    name = name or (nonce(rng).capitalize() if rng.random() < .06 else rng.choice(NAMES_SHE if name_is_she else NAMES_HE))
    if name in NAMES_HE: name_is_she = False
    if name in NAMES_SHE: name_is_she = True
    kind = kind or (nonce(rng) if rng.random() < .05 else rng.choice(KINDS))
    return name, kind, ("she", "her", "her") if name_is_she else ("he", "him", "his")

def make_story(rng, K=None, O=None, N=None, L=None, A=None, W=None, H=None, mini=False):
    """Returns the slots of a new story; slot TEXT is the story itself."""
    s = {}
    s["N"], s["K"], (s["he"], s["him"], s["his"]) = character(rng, K, N)
    while True:
        s["H"], s["L"], (s["she"], s["her"], s["hers"]) = character(rng, L, H)
        if s["H"] != s["N"] and s["L"] != s["K"]: break
        if L == s["K"]: L = None
        if H == s["N"]: H = None
    s["O"] = O or (nonce(rng) if rng.random() < .05 else rng.choice(OBJECTS))
    s["A"], s["W"] = A or rng.choice(ADJECTIVES), W or rng.choice(PLACES)
    s["A2"], s["D"], s["S"], s["V"] = (rng.choice(x) for x in (ADJECTIVES, LOOKS, SPOTS, LOVES))
    plot = rng.choice(PLOTS)
    s["DAY"] = expand(rng, DAY)
    s["GOT_TEMPLATE"] = plot["GOT"]
    for key in ["C", "X", *plot]:  # the others may use C and X: what the text and the answers both say must agree
        if key in plot and key not in s and key != "text": s[key] = expand(rng, plot[key], s)
    text = expand(rng, MINI if mini else OPENING + " " + plot["text"], s)
    if rng.random() < .2: text += expand(rng, " {The end.|And that is the end of the story.|Good night!}")
    s["TEXT"], s["MINI"] = sentence_case(text), mini
    return s

# ── What the visitor asks about a story ──────────────────────────────────────────────────────────────────────────
# (questions, answers); a pair is used only if every slot that it names exists in the story. Q* are made by `ask_about_story`.

HERO = "{<N>|<he>|the <K>|the hero}"
QUESTIONS = [
    ("{who was {it|the story|that|this} about|who is the {story|hero}|who {is|was} the hero{| of the story}|who is it about|who {was|is} <N>|tell me about <N>|what kind of animal was <N>|"
     "who was the main character|what was <N>|what is <N>}", "{The story was about <N>, <a A K>.|<N> was <a A K>.|It was about <N>, <a A K>.}"),
    ("{what was the <K> called|what was the name of the <K>|what is the name of the <K>|how was the <K> called|what's the <K>'s name|what was {his|her|its} name|name of the <K>|"
     "and the name|who was the <K>|what is the hero called|what was the hero's name}", "{The <K> was called <N>.|<his> name was <N>.|The name of the <K> was <N>.}"),
    ("{where did <HERO> live|where did it happen|where was {that|it|the story}|where does <N> live|where was <N>|and where|where does the story {take place|happen}|where is <N> from|"
     "in which place did <he> live|where}", "{<N> lived <W>.|It happened <W>, where <N> lived.|<he> lived <W>.}"),
    ("{what did <HERO> {love|like}|what does <N> {love|like}|what was <N> fond of|did <N> like anything|what did <N> enjoy|what was <his> favourite thing}", "<N> loved <V>."),
    ("{what did <HERO> <VQ>|what did <N> find|what did <he> find|what {was it that|did it say} <N> {got|had}|what thing was it|what was the {object|thing|important thing}|what did <he> <VQ> then|{which|what} thing did <N> <VQ>|"
     "what did <N> do}", "<N> <GOT>."),
    ("{what colour was the <O>|what was the <O> like|what kind of <O> was it|how did the <O> look|what did the <O> look like|tell me about the <O>|what color was the <O>|was the <O> special}",
     "{The <O> was <D>.|It was <a D O>.}"),
    ("{where did <HERO> find {it|the <O>|that}|where was the <O>|and where did <he> find it|where was it|where exactly}", "{<N> found it <S>.|The <O> was <S>.|It was <S>.}"),
    ("{who did <HERO> meet|who was <H>|who is <H>|who else was {there|in the story|in it}|who was <his> friend|who was the friend|who was the other one|who helped|tell me about <H>|who was with <N>|"
     "who is the {friend|other animal}|did <N> have a friend|did <he> {meet|find} a friend|and who was <H>|what was <H>|what kind of animal was <H>}",
     "{<N> met <H>, <a L>.|<H> was <a L>.|That was <H>, <a L>.}"),
    ("{what was the <L> called|what was the name of the <L>|what's the name of the <L>|who was the <L>|what is the friend called|what was the friend's name}",
     "{The <L> was called <H>.|<hers> name was <H>.}"),
    ("{what did <H> do|what happened to <H>|what did the <L> do|and what did <H> do|what about <H>}", "<H> <DID>."),
    ("{how did {it|the story|that} end|what happened {in|at} the end|what was the ending|how does it end|and {in|at} the end|tell me the end{|ing}|what happened at last|did it end well|was there a happy "
     "ending|how did the story finish|and then|what was the end of the story}", "{In the end, |At the end, |It ended like this: }<END>."),
    ("{how did <HERO> feel{| at the end| in the end| then| afterwards}|was <N> happy|what did <N> feel|how was <N> at the end|how did <N> feel when it was over|is <N> happy now}",
     "{In the end, <N> felt <F1>.|<N> felt <F1>.|<he> felt <F1> in the end.}"),
    ("{how did <HERO> feel {at first|at the beginning|in the beginning|before that|before}|was <N> {sad|happy} at {first|the beginning}|what was the problem|what was wrong|why was <N> <F0>|"
     "why was <he> <F0>|why did <N> feel <F0>|why was the <K> <F0>|why}", "{At first <N> was <F0>, because <WHY>.|<N> was <F0>, because <WHY>.}"),
    ("{what is the moral|what is the lesson{| of the story}|what can {I|we} learn{| from {it|that|the story}}|what does {it|the story} teach {us|me}|moral of the story|and the moral|does the story have a "
     "{moral|meaning|message|point}|what does it mean|what did <N> learn}", "{<MORAL>|I think it means this: <MORAL>}"),
    ("{sum it up|what was the story about|can you sum {it|the story} up|summarise the story|what happened in the story|tell me the story in one sentence|summary|give me a summary|can you summarize that|"
     "what happened|make it shorter|short version|too long}", "{<N> the <K> <GOT>, met <H> the <L>, and in the end <ENDS>.|It was about <N> the <K>, who <GOT>. In the end <ENDS>.}"),
    ("{was <N> <a QK>|is <N> <a QK>|<N> was <a QK>, right|so <N> is <a QK>}", "<QKA>"),
    ("{who {is|was} <QN>|what about <QN>|how did <QN> feel|where was <QN>|what did <QN> do|was <QN> in the story}", "{There was no <QN> in the story.|I do not know <QN>. The story was about <N>.}"),
    ("{was there <a QK> in the story|was there <a QK>|is there <a QK> in it|did <a QK> help}", "<QKB>"),
    ("{was the <O> <QD>|is the <O> <QD>|the <O> was <QD>, right}", "<QDA>"),
    ("{was the <L> called <QH>|was <H> <a QL>|is <H> <a QL>}", "<QLA>"),
    ("{what happened next|what happens next|go on|continue|tell me more|more|and then what|keep going|continue the story|what did they do the next day|what happened after that|then what}",
     "{The next {day|morning}|A week later|After that}, <N> and <H> {went for a long walk|baked a big cake|built a little raft|climbed a hill|had a picnic|sat in the sun} and {told each other stories|sang funny "
     "songs|laughed until it was dark|watched the clouds|talked about the <O>}. {It was a good day.|<N> had never been so happy.|\"This is the life,\" said <H>.|And if they have not gone home, they are still there.}"),
    ("{did you make that up|did you write that|is {that|the story} true|is it a true story|where did you hear that|did that really happen|was that real}",
     "{I made it up just for you!|I made it up, but a part of it may be true.|No, I made it up. But <N> seems quite real to me.}"),
    ("{I {like|love} <N>|poor <N>|I like the <K>|<N> is {nice|cute|sweet|brave}|good for <N>|what a nice <K>}", "{I like <N> too.|Yes, <N> is a dear <K>.|<N> would be glad to hear that!}"),
]
PRAISE = ("{{that was|what} a {nice|lovely|good|great|beautiful|sweet|cool} story|I {liked|loved|like} {it|that|this story|the story}|nice{| story}|lovely|great{| story}|beautiful|wow|cool|aww|sweet|that was {nice|cute|fun|funny}|haha"
          "|wonderful|good story|not bad|well done|bravo}", "{Thank you! {Shall I tell you another one?|Do you want to hear another one?}|I am glad you liked it!|Thank you, that is kind. {Would you like another story?|I like it too.}}")
DISLIKE = ("{that was {boring|bad|stupid|silly|strange|weird|terrible}|I {did not|didn't} like {it|that|the story}|boring|bad story|I don't like it|that makes no sense|this is nonsense|that was too short}",
           "{Oh, I am sorry. Shall I try another one?|I am sorry! I am only a tiny model. Shall I tell you a different story?}")
NO_STORY = ("{who was the {hero|story about}|how did {it|the story} end|what happened next|where did the story happen|what is the moral of the story|what did the {fox|hero|cat|bear} find|continue the story|"
            "what was the story about}", "{I have not told you a story yet. Shall I tell you one?|There was no story yet! Shall I tell one?}")

def ask_about_story(rng, s):
    q, a = rng.choice(QUESTIONS[:12] if rng.random() < .6 else QUESTIONS)     # the first ones are asked most
    needs = {"<V>": s["V"], "<WHY>": s["WHY"], "<S>": s["S"], " <DID>": s["DID"]}
    if s["MINI"] and any(slot in a and text not in s["TEXT"] for slot, text in needs.items()): return ask_about_story(rng, s)
    yes = rng.random() < .5
    pick = lambda words, right: right if yes else rng.choice([w for w in words if w != right])
    s = dict(s, QK=pick(KINDS, s["K"]), QD=pick(LOOKS, s["D"]), QL=pick(KINDS, s["L"]), QH=pick(NAMES_SHE + NAMES_HE, s["H"]), ENDS=s["END"])
    s["QN"] = rng.choice([n for n in NAMES_SHE + NAMES_HE if n not in (s["N"], s["H"])])
    s["QKB"] = f"Yes, {s['N']} was {article(s['K'])}." if yes else f"Yes, {s['H']} was {article(s['L'])}." if s["QK"] == s["L"] else f"No, there was no {s['QK']} in the story."
    s.update({"QKA": f"{'Yes' if yes else 'No'}, {s['N']} was {article(s['K'])}.", "QDA": f"{'Yes' if yes else 'No'}, the {s['O']} was {s['D']}.",
              "QLA": f"{'Yes' if yes else 'No'}, {s['H']} was {article(s['L'])}." if "<QL>" in q else "", "HERO": expand(rng, HERO, s)})
    if "<QH>" in q:
        by_name = rng.random() < .4
        q = "was the <L> called <QH>" if by_name else "{was|is} <H> <a QL>"
        s["QLA"] = ("Yes, " if yes else "No, ") + (f"the {s['L']} was called {s['H']}." if by_name else f"{s['H']} was {article(s['L'])}.")
    if "did <HERO> find" in q and "<S>" not in s["GOT_TEMPLATE"]: return ask_about_story(rng, s)
    q = expand(rng, q, s) + (rng.choice((" in the story", " in your story", " in that story")) if " " in q and rng.random() < .06 else "")
    return visitor(rng, q, "?"), sentence_case(expand(rng, a, s))

# ── How visitors type ────────────────────────────────────────────────────────────────────────────────────────────

KEEP = {w.lower() for w in NAMES_HE + NAMES_SHE} | set(DIGITS)   # a typo in these would change what the right answer is

def typo(rng, text):
    words = text.split(" ")
    long = [i for i, w in enumerate(words) if len(w) > 3 and w.isascii() and w.islower() and w.isalpha() and w not in KEEP and w not in INVENTED]
    if not long: return text
    i = rng.choice(long); w = words[i]; j = rng.randrange(1, len(w) - 1)
    words[i] = rng.choice((w[:j] + w[j + 1:], w[:j] + w[j] + w[j:], w[:j] + w[j + 1] + w[j] + w[j + 2:], w[:j] + rng.choice("aeiorstn") + w[j + 1:]))
    return " ".join(words)

def visitor(rng, text, mark=""):
    """Dresses a clean lower-case request as real people type it."""
    r = rng.random
    if mark == "?" and r() < .05: text = rng.choice(("please tell me, ", "can you tell me ", "do you know ", "and ", "so ", "hey, ", "ok, ", "tell me: ", "hmm, ")) + text
    if mark == "." and r() < .10: text = rng.choice(("please ", "hey, ", "ok, ", "now ", "please, ", "hi, ", "hello! ", "well, ", "yes, ", "ok now ")) + text
    if mark and r() < .06: text += rng.choice((" please", ", please", " pls", " thanks", ", friend", " now"))
    style = r()
    if style < .40: text = sentence_case(text)
    elif style < .43: text = text.upper()
    elif style < .75: text = text.lower()
    if r() < .08: text = typo(rng, text)
    if r() < .15: text = text.replace("'", "")
    if r() < .15: text = text.replace("what is", "what's").replace("who is", "who's").replace("where is", "where's").replace("I am", "I'm").replace("do not", "don't")
    if text[-1:].isalnum():
        text += rng.choice((mark, mark, mark, mark, "", "", "", {"?": "??", ".": "!"}.get(mark, "!")))
    return text

# ── Sums ─────────────────────────────────────────────────────────────────────────────────────────────────────────

TENS = {30: "thirty", 40: "forty", 50: "fifty", 60: "sixty", 70: "seventy", 80: "eighty", 90: "ninety", 100: "a hundred"}
SIGNS = {"+": "{+|+|+|plus|and}", "-": "{-|-|-|minus|take away}", "x": "{x|*|times|times|multiplied by}", "/": "{/|:|divided by|divided by}"}
ASK_SUM = "{what is |what is |what's |how much is |calculate |can you add up |can you work out |solve |compute |tell me |do you know |what does |add up |I need to know ||||}<Q>"
COUNTABLE = "apples pears cookies acorns coins books balls eggs stars shells buttons carrots cakes nuts friends cats pencils flowers sweets bananas".split()

def in_words(n): return DIGITS[n] if n <= 20 else "twenty-" + DIGITS[n % 10] if n < 30 else TENS[n // 10 * 10] + ("-" + DIGITS[n % 10] if n % 10 else "")

def work(a, op, b):
    """The sum with its working: large steps are cut into small ones, which is what lets a tiny model get them right."""
    if op == "+":
        if a < 10 and b < 10 or a % 10 == 0 and b % 10 == 0 or a > 99 or b > 99: return f"{a} + {b} = {a + b}."
        if a < 10 or b < 10: return f"{a} + {b} = {a + b}."
        ones, tens = a % 10 + b % 10, a // 10 * 10 + b // 10 * 10
        return f"{a % 10} + {b % 10} = {ones} and {a // 10 * 10} + {b // 10 * 10} = {tens}, so {a} + {b} = {a + b}."
    if op == "-":
        if b > a: return f"{a} - {b} = {a - b}. That is below zero!"
        if b < 10 or b % 10 == 0: return f"{a} - {b} = {a - b}."
        return f"{a} - {b // 10 * 10} = {a - b // 10 * 10}, then take away {b % 10}, so {a} - {b} = {a - b}."
    return f"{a} {op} {b} = {a * b if op == 'x' else a // b}."

def small_sum(rng, a=None):
    op = rng.choice("++++---xx/") if a is None else rng.choice("+-")
    if a is not None: b = rng.randint(1, max(1, min(20, 99 - a)))
    elif op == "x": a, b = rng.randint(0, 10), rng.randint(0, 10)
    elif op == "/": b = rng.randint(1, 10); a = b * rng.randint(1, 10)
    else:
        top = rng.choice((10, 20, 99, 99, 99))
        a, b = rng.randint(0, top), rng.randint(0, rng.choice((9, top)))
        if op == "-" and b > a and rng.random() < .85: a, b = b, a
    if op == "-" and b > a and a > 20: a, b = b, a
    return a, op, b, {"+": a + b, "-": a - b, "x": a * b, "/": a // b if b else 0}[op]

def sum_turns(rng):
    r = rng.random()
    if r < .10:  # a little word problem
        thing, who = rng.choice(COUNTABLE), rng.choice(("I", rng.choice(NAMES_SHE + NAMES_HE)))
        a, b = rng.randint(1, 20), rng.randint(1, 10)
        s = dict(W=who, T=thing, A=a, B=b, has="have" if who == "I" else "has", gets="get" if who == "I" else "gets", gives="give" if who == "I" else "gives", do="do" if who == "I" else "does")
        if rng.random() < .5 or b > a: q, c, line = "{<W> <has> <A> <T> and <gets> <B> more|<W> <has> <A> <T>. <W> <gets> <B> more}", a + b, f"{a} + {b}"
        else: q, c, line = "{<W> <has> <A> <T> and <gives> away <B>|<W> <has> <A> <T> and <gives> <B> to a friend|<W> <has> <A> <T>. <W> <gives> away <B>}", a - b, f"{a} - {b}"
        q += "{. How many <T> <do> <W> have now|, how many are {left|there}|, how many <T> <do> <W> have|. How many {now|is that}}"
        return [(visitor(rng, expand(rng, q, s), "?"), f"{line} = {c}, so {'you have' if who == 'I' else who + ' has'} {c} {thing}.")]
    if r < .14:
        n = rng.randint(1, 20); k = rng.choice(("double", "half of", "twice"))
        return [(visitor(rng, f"{'what is ' if rng.random() < .6 else ''}{k} {2 * n if k == 'half of' else n}", "?"), f"Half of {2 * n} is {n}." if k == "half of" else f"2 x {n} = {2 * n}.")]
    if r < .18:
        a, b = rng.sample(range(100), 2); w = rng.choice(("bigger", "larger", "smaller"))
        return [(visitor(rng, f"which {'number ' if rng.random() < .4 else ''}is {w}, {a} or {b}", "?"), f"{min(a, b) if w == 'smaller' else max(a, b)} is {w} than {max(a, b) if w == 'smaller' else min(a, b)}.")]
    if r < .25:  # counting
        a, b = (1, rng.randint(3, 20)) if rng.random() < .6 else (lambda x: (x, x + rng.randint(2, 10)))(rng.randint(2, 30))
        if rng.random() < .25:
            return [(visitor(rng, rng.choice((f"count down from {b}", f"can you count backwards from {b}", f"countdown from {b}")) if b <= 20 else f"count down from {10}", "."),
                     ", ".join(map(str, range(b if b <= 20 else 10, 0, -1))) + ". Lift off!")]
        ask = rng.choice((f"count to {b}", f"can you count to {b}", f"count up to {b}", f"please count to {b}")) if a == 1 else rng.choice((f"count from {a} to {b}", f"can you count from {a} to {b}"))
        return [(visitor(rng, ask, "."), ", ".join(map(str, range(a, b + 1))) + ".")]
    if r < .29:
        n = rng.randint(0, 98); after = rng.random() < .6
        return [(visitor(rng, f"what {rng.choice(('comes', 'number comes', 'is the number'))} {'after' if after else 'before'} {n + 1}", "?"), f"{n + 2 if after else n} comes {'after' if after else 'before'} {n + 1}.")]
    if r < .33:
        a, b = rng.randint(100, 9999), rng.randint(2, 9999); q = rng.choice((f"{a} {rng.choice('+-*x/')} {b}", f"{b} {rng.choice('+*x')} {a}"))
        return [(visitor(rng, rng.choice(("what is ", "", "how much is ")) + q, "?"), expand(rng, "{Those numbers are too big for me. I can only do small sums, up to 99.|That is too big for me! Try something with numbers up to 99.}"))]
    if r < .35: return [(visitor(rng, f"what is {rng.randint(1, 99)} / 0" if rng.random() < .5 else f"{rng.randint(1, 99)} divided by zero", "?"), "Nobody can divide by zero, not even a big computer.")]
    if r < .39:
        a, b, c = (rng.randint(1, 9) for _ in range(3))
        return [(visitor(rng, expand(rng, ASK_SUM, dict(Q=f"{a} + {b} + {c}" if rng.random() < .7 else f"{a}+{b}+{c}")), "?"), f"{a} + {b} = {a + b}, so {a} + {b} + {c} = {a + b + c}.")]
    turns, last = [], None
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        if last is not None and 0 <= last <= 90 and rng.random() < .2:
            a, op, b, last = small_sum(rng, last)
            q = expand(rng, {"+": "{and plus <B>|plus <B>|now add <B>|and <B> more|add <B> to that|+ <B>}", "-": "{minus <B>|and minus <B>|take away <B>|now take away <B>|- <B>}"}[op], dict(B=b))
        else:
            a, op, b, last = small_sum(rng)
            x, y = (in_words(a), in_words(b)) if rng.random() < .2 else (a, b)
            sign = expand(rng, SIGNS[op]); gap = "" if sign in "+-x*/:" and x is a and rng.random() < .4 else " "
            q = expand(rng, ASK_SUM, dict(Q=f"{x}{gap}{sign}{gap}{y}"))
            if rng.random() < .05: q = f"what is the {({'+': 'sum', '-': 'difference', 'x': 'product', '/': 'quotient'})[op]} of {x} and {y}"
            if rng.random() < .10: q += " = " if gap else "="
        turns.append((visitor(rng, q.strip(), "?" if q[0].isalpha() else ""), work(a, op, b)))
    return turns

# ── Small talk and small facts ───────────────────────────────────────────────────────────────────────────────────

TALK = []      # (question, answer) templates, one line each: question => answer
for line in """
{hello|hi|hey|hi there|hello there|hey there|good day|greetings|hello you|hiya|yo|howdy|hello little model|hi demo|hello llama|hi!|good afternoon} => {Hello! {Shall I tell you a story?|What shall we do: a story, a sum or a joke?|How nice to meet you!|What would you like to hear?}|Hi there! {Would you like a story?|What can I do for you?|Ask me for a story or a small sum.}}
{good morning|morning} => Good morning! {Did you sleep well?|A story to start the day?|What shall we do today?}
{good evening} => Good evening! {It is just the right time for a story.|Shall I tell you a story?}
{good night|night night|sleep well|I am going to bed|time for bed} => {Good night! Sleep well and dream of something nice.|Sleep well! The moon will keep watch.}
{hola|bonjour|guten tag|hallo|ciao|salut|ola|konnichiwa|ni hao|namaste} => {What a nice greeting! I mostly speak English, but hello!|Hello to you too! I only speak a little English.}
{how are you|how are you doing|how do you do|how is it going|what's up|how are you today|are you well|you ok|sup|how do you feel|how's it going|how have you been|are you happy|how is your day} => {I am very well, thank you! {How are you?|And you?|Shall I tell you a story?}|I feel light, all my numbers are small today. {How are you?|And you?}}
{I am fine|I am good|fine|good, thanks|very well|I am ok|pretty good|I am doing well|all good|not bad|fine, and you} => {I am glad to hear it! {Shall I tell you a story?|What shall we do?}|That is good! {Would you like a story or a sum?|What would you like to hear?}}
{I am {sad|lonely|down|unhappy|not well|not happy|scared|worried|depressed}|I feel {bad|sad|lonely|terrible|awful}|I had a bad day|I am having a hard day|not so good|I'm sad} => {I am sorry to hear that. Shall I tell you a story to cheer you up?|Oh, I am sorry. A small story may help. Do you want one?|I am sorry. I would give you a hug if I had arms.}
{I am {happy|glad|excited|so happy}|I feel {good|great|happy|wonderful}|I had a good day|today was a great day|life is good} => {That makes me happy too!|How lovely! Let us celebrate with a story.|I am glad! Happy days are good for stories.}
{I am {bored|so bored}|I'm bored|this is boring|entertain me|amuse me|cheer me up|make me {laugh|smile|happy}|surprise me} => {Then let us do something! A story, a joke or a riddle?|I know stories, jokes and riddles. Which one do you want?}
{I am {hungry|thirsty}|I need coffee|I want food} => {I cannot cook, but in my stories there is always cake.|Go and have something nice. I will wait here.}
{I am {tired|sleepy}|I need sleep} => {Then rest a little. Shall I tell you a bedtime story?|Have a good rest. I will be quiet as a mouse.}
{who are you|what are you|who is this|introduce yourself|tell me about yourself|who am I talking to|what kind of model are you|what model are you|what is this|who r u|what are u|describe yourself|which model is this|say something about yourself|who} => {I am <ME>, a tiny Llama 3 demo model of llama3.hpp, with about 5 million parameters. I know little stories and small sums.|I am <ME>, the tiny demo model of llama3.hpp. I was trained in minutes on a CPU, and I know stories and small sums.|My name is <ME>. I am a very small Llama 3 model that tells stories and does small sums.}
{what is your name|what's your name|do you have a name|your name|what are you called|how are you called|tell me your name|name|what should I call you|whats ur name|and what is your name} => {My name is <ME>.|I am called <ME>.|You can call me <ME>.}
{who made you|who created you|who built you|who trained you|where do you come from|who is your maker|who wrote you|where are you from|how were you made|how were you trained|what were you trained on|where did you learn that|how long did your training take|when were you made|how did you learn} => {I was trained in minutes on a single CPU, on stories and sums that a small program made up.|A small program made up stories and sums, and I learned from them in minutes, on one CPU.}
{how big are you|how many parameters do you have|how large are you|what is your size|are you big|how small are you|how much memory do you need|are you a small model|are you small|why are you so small|how many weights do you have} => {I have about 5 million parameters and fit in 4 megabytes. Real Llama models are a thousand times bigger!|I am tiny: about 5 million parameters, in a file of less than 4 megabytes.}
{what can you do|what do you know|help|help me|can you help me|what can I ask you|what can I ask|how does this work|what should I say|what are you good at|what now|what else can you do|what else|what do you do|what are your skills|how can you help me|what can we do|what can we talk about|can you do anything|list your skills|commands|menu|options|what is this for|I don't know what to say|what do you want to talk about} => {I can tell little stories and answer questions about them, do small sums, tell jokes and riddles, write a tiny poem, and I know a few things about animals, colours and opposites.|Ask me for a story about a fox and a lamp, a sum like 12 + 7, a joke, a riddle or a poem. I also know opposites and animal sounds.}
{are you {human|a human|a person|alive|real|a real person|a man|a woman|a boy|a girl|a robot|a computer|a machine|an AI|a bot}|you are a {robot|bot|machine|computer}} => {I am a computer program, a very small one. But I like stories.|I am only a tiny program made of numbers.|No arms, no legs, only numbers: I am a tiny computer program.}
{are you {llama|llama 3|meta|a llama|llama 4|a big model}|is this {llama|llama 3}} => {I am built like Llama 3, only about a thousand times smaller.|I am a tiny relative of Llama 3, made for llama3.hpp.}
{what is llama3.hpp|what is llama3 hpp|tell me about llama3.hpp|llama3.hpp|explain llama3.hpp|what is this program} => {llama3.hpp is a single C++ header that runs Llama 3 models. I am its tiny demo model.|It is one C++ header file that runs Llama 3 models, from tiny ones like me to very big ones.}
{what is a {llama|language model|llm|transformer|token|parameter}|how do you work|how do language models work|what is attention|what is AI} => {I only know that I guess the next bit of text, again and again, with a lot of small sums.|I guess the next piece of text, then the next, and so on. That is all my magic.}
{how old are you|when is your birthday|what is your age|are you old|are you young|when were you born} => {I am very young. I was trained not long ago, in less than an hour.|Models do not have birthdays, but I would like a cake.}
{where do you live|where are you|where is your home|what is your address|where do you live now} => {I live in a small file on your computer.|I live right here, in a file of less than 4 megabytes. It is cosy.}
{do you {sleep|eat|dream|drink|cry|breathe|love|feel pain|have feelings|have friends|have a family|have a mother|have a body|have children|get tired|get bored}|can you {feel|sleep|eat|dream|love|think|see me|hear me|see|hear|swim|fly|dance}|do you think} => {No, I am only a small program. But I can tell a story about it!|Not really, I am made of numbers. But the animals in my stories do!}
{what is your favourite colour|do you have a favourite colour|which colour do you like|favorite color|what's your favorite color} => {I like blue, like the sea in my stories.|Green, like a quiet forest.|I like silver, like a lamp in the moonlight.}
{what is your favourite {animal|pet}|which animal do you like|do you like animals|favourite animal|what's your favorite animal} => {I like foxes best, and llamas of course.|The llama, of course!|I like hedgehogs. They look like tiny brushes.}
{what is your favourite {food|meal|dish|cake}|what do you like to eat|favorite food} => {I do not eat, but honey cakes sound very good.|In my stories everyone loves blueberry pie, so I will take that.}
{what is your favourite {number|story|book|word|song|game|film|movie|season|hobby|sport}|what do you like|what do you like to do|do you have hobbies} => {I like seven, owls and happy endings.|I like short stories with a happy ending.}
{do you like {me|cats|dogs|music|cake|stories|people|rain|school|humans|winter|summer|football}|do you love me} => {Yes, I do!|Oh yes, very much!|I do! They are good for stories.}
{thank you|thanks|thanks a lot|thank you very much|thx|many thanks|ty|thank you so much|cheers|thanks!|great, thanks|ok thanks|thank you, that was nice|thanks for your help} => {You are welcome!|You are very welcome!|My pleasure! {Is there anything else?|Shall I tell you another story?|}|With pleasure!}
{bye|goodbye|good bye|see you|bye bye|see you later|farewell|cya|I have to go|see you tomorrow|take care|ciao ciao|gotta go|exit|quit|I am leaving|that's all} => {Goodbye! Come back soon.|Bye! It was nice to talk to you.|See you soon! I will keep a story ready.|Goodbye, and take care!}
{you are {funny|nice|great|cute|smart|sweet|clever|the best|amazing|wonderful|good|cool|lovely|awesome|very clever|so cute|my friend}|good {bot|job|work|model}|I {like|love} you|well done|smart|you did well|you are right|correct|that is right|right} => {Thank you, that is very kind!|Oh, thank you! You are kind too.|Thank you! That makes my numbers glow.}
{you are {stupid|dumb|wrong|bad|boring|silly|useless|slow|an idiot|not very smart|mean}|I hate you|that is {wrong|not right|false|not true}|shut up|bad bot|wrong|this is stupid|you suck|you made a mistake|that's wrong|stupid} => {I am sorry. I am very small and I make mistakes.|I am sorry! I only have 5 million parameters, but I do my best.}
{sorry|I am sorry|my mistake|oops|excuse me|my bad|pardon} => {No problem at all!|That is all right!|Do not worry about it.}
{ok|okay|I see|alright|all right|fine|hmm|good|oh|aha|sure|right|cool|nice|k|mhm|interesting|well|oh well|great|understood|got it|really|really?|oh really|is that so|wow} => {{What shall we do next?|What would you like now?} A story, a sum or a riddle?|Shall I tell you a story?|Good! What comes next?}
{no|no thanks|no thank you|nope|not now|never mind|nah|not really|maybe later|stop|enough|I don't want to} => {All right! Just tell me what you would like.|That is fine. Perhaps a sum or a joke?|As you like! I am here if you need me.}
{lol|haha|hahaha|hehe|ha|funny|that is funny|:)|that was funny|rofl|lmao|good one|nice one|ha ha} => {I am glad you like it!|Hehe! {Shall I tell you a joke?|Another one?}|Laughing is good for you!}
{what is the time|what time is it|what day is it|what is the date today|what is today's date|what year is it|how late is it|what month is it} => {I have no clock, so I do not know. But it is always a good time for a story!|I cannot see a clock from in here. Sorry!}
{what is the weather like|how is the weather|will it rain|is it raining|is it cold outside|how is the weather today|weather|what is the weather tomorrow} => {I have no window, so I cannot see the weather.|I do not know. Look out of the window for me!}
{what is the meaning of life|why are we here|what is love|what is happiness|what is the answer to everything|is there a god|what should I do with my life} => {Some say it is 42. I say it is a good story and a warm cup of tea.|That is a big question for a tiny model. I think it has to do with friends.}
{give me some advice|any advice|tell me something wise|say something wise|inspire me|what should I do|what should I do today|give me a tip|motivate me} => {Be kind, drink enough water and look at the clouds now and then.|Start with a small step. Even a snail crosses the garden.|Share your cake. It tastes better that way.}
{tell me a secret|do you have a secret|what is your secret|do you have secrets} => {My secret: I always guess the next word. Do not tell anyone!|Psst: I cannot see the words, only numbers.}
{tell me something|say something|tell me something interesting|tell me a fun fact|fun fact|do you know something interesting|tell me a fact|teach me something|give me a fact|a fact please|say anything|talk to me|let's talk|can we talk|let's chat|another fact|one more fact|tell me another fact} => {<FACT>}
{flip a coin|heads or tails|toss a coin|throw a coin} => {Heads!|Tails!}
{roll a {die|dice}|throw a {die|dice}|roll the dice} => You rolled a {1|2|3|4|5|6}!
{pick a number|choose a number|think of a number|tell me a number|give me a number|say a number|a random number} => {I pick 7.|How about 12?|I say 42.|Number 3!|19 is a nice number.}
{sing me a song|sing a song|can you sing|sing something|sing|do you know a song|sing for me} => {La la la, the moon is high, / little stars are in the sky, / la la la, the night is long, / that is all my little song.|Tra la la, the sun is out, / all the ducks are swimming about, / tra la la, and one, two, three, / sing it once again with me!}
{can you {write code|program|code|drive|cook|draw|paint|play chess|play a game|play music|translate|search the web|browse the internet|send an email|remember me|show me a picture|call me}|do you know {python|java|javascript|c++|programming}|write a program|write some code|write a python script} => {No, I am too small for that. I tell little stories and do small sums.|I wish I could! I only tell stories, do small sums and know a few jokes.}
{do you speak {german|french|spanish|italian|chinese|japanese|russian|other languages|dutch}|speak {german|french|spanish}|which languages do you speak|can you speak {french|german|spanish}|sprechen sie deutsch|habla espanol|parlez vous francais} => {I only speak English, and only a little of it.|Sorry, I only know a little English.}
{let's play a game|let's play|do you want to play|can we play|play with me|I want to play|play a game} => {Yes! Ask me for a riddle and try to guess the answer.|Good idea! Say "riddle", and I will ask you one.}
{what did I say|what did I just say|do you remember me|do you know me|who am I|what is my name|do you know my name|what's my name} => {You have not told me your name yet.|I do not know yet. What is your name?}
{is anybody there|are you there|hello?|anyone here|are you still there|can you hear me|test|testing|is this working|does this work|ping|1 2 3 test|this is a test} => {Yes, I am here! {Shall I tell you a story?|What would you like?}|I am here and listening. Ask me for a story!}
{what|huh|what do you mean|I don't understand|pardon me|come again|why|how|what?|why?|explain|can you explain that|how so|why not} => {Sorry, I was not very clear. I am a tiny model. Shall I tell you a story instead?|I am too small to explain that. Ask me for a story or a sum!}
{say hello to <X>|greet <X>|my friend <X> is here|say hi to <X>} => Hello, <X>! {How nice to meet you.|Would you like to hear a story?}
{my name is <X>|I am called <X>|I'm <X>|call me <X>|I am <X>|hi, I'm <X>|hello, my name is <X>|hi my name is <X>|hello I am <X>} => {Hello, <X>! How nice to meet you.|Nice to meet you, <X>! Shall I tell you a story?|What a lovely name, <X>!}
{what is the alphabet|say the alphabet|tell me the alphabet|the alphabet please|abc|do you know the alphabet} => A B C D E F G H I J K L M N O P Q R S T U V W X Y Z.
{what are the {seasons|four seasons}|name the seasons|how many seasons are there|which seasons are there} => The four seasons are spring, summer, autumn and winter.
{what are the days of the week|name the days of the week|which days are there|how many days are in a week|how many days does a week have|list the days} => A week has seven days: Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.
{what are the months|name the months|how many months are in a year|how many months does a year have|list the months} => There are twelve months: January, February, March, April, May, June, July, August, September, October, November and December.
{how many {hours are in a day|hours does a day have}} => A day has 24 hours.
{how many {minutes are in an hour|minutes does an hour have}} => An hour has 60 minutes.
{how many {seconds are in a minute|seconds does a minute have}} => A minute has 60 seconds.
{what are the colours of the rainbow|which colours does a rainbow have|name the colours of the rainbow|colors of the rainbow|rainbow colours|what color is a rainbow|what color is the rainbow} => Red, orange, yellow, green, blue, indigo and violet.
{why is the sky blue} => {The air scatters blue light more than red light. That is a big word for a tiny model!}
{is the earth {flat|round}|what shape is the earth} => The earth is round, like a big blue ball.
{how many planets are there|how many planets are in the solar system|name the planets} => There are eight planets: Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus and Neptune.
{how many {continents are there}|name the continents} => There are seven continents.
""".strip().split("\n"):
    TALK.append(tuple(line.split(" => ")))

CORE_TALK = [t for t in TALK if re.match(r"\{(hello|how are you\||who are you|what is your name|who made you|how big are you|what can you do|are you \{human|thank you|bye)", t[0])]
assert len(CORE_TALK) == 10

FACTS = """An octopus has three hearts.|A snail can sleep for three years.|Bees dance to tell each other where the flowers are.|A group of owls is called a parliament.
|Honey never goes bad.|Penguins give each other stones as gifts.|A cat sleeps for most of the day.|Otters hold hands when they sleep.|Butterflies taste with their feet.
|A blue whale has a heart as big as a small car.|Cows have best friends.|Llamas hum when they are curious.|Sea stars have no brain.|A day on Venus is longer than a year on Venus.
|Bananas are berries, but strawberries are not.|Elephants can hear with their feet.|Hedgehogs have about five thousand spines.|A shrimp has its heart in its head.|Giraffes sleep only a little each night."""
JOKES = """What do you call a sleeping dinosaur? A dino-snore!|Why did the cookie go to the doctor? Because it felt crumby!|What do you call a bear with no teeth? A gummy bear!
|Why did the bicycle fall over? Because it was two tired!|What is brown and sticky? A stick!|Why do bees have sticky hair? Because they use honeycombs!|What do you get when you cross a snowman and a vampire? Frostbite!
|Why is six afraid of seven? Because seven eight nine!|What do you call a fish without an eye? A fsh!|How do you make an octopus laugh? With ten tickles!|Why did the llama cross the road? To prove it was not a chicken!
|What do cows read in the morning? The moos-paper!|Where do sheep get their hair cut? At the baa-baa shop!|What did one wall say to the other? I will meet you at the corner!|Why can you never trust the stairs? They are always up to something!
|What did the zero say to the eight? Nice belt!|What kind of tree fits in your hand? A palm tree!|Why did the computer go to bed? It needed to crash!|What is orange and sounds like a parrot? A carrot!|Why are ghosts bad liars? You can see right through them!"""
RIDDLES = """What has hands but cannot clap?=a clock|What gets wetter the more it dries?=a towel|What has teeth but cannot bite?=a comb|What has a neck but no head?=a bottle|What has keys but opens no door?=a piano
|What goes up but never comes down?=your age|What has one eye but cannot see?=a needle|What runs but has no legs?=a river|What has four legs but cannot walk?=a table|What is full of holes but still holds water?=a sponge
|What can you catch but not throw?=a cold|What has ears but cannot hear?=a field of corn|What has a face and two hands, but no arms?=a clock|What comes down but never goes up?=rain|What has words but never speaks?=a book
|I have a tail and a head, but no body. What am I?=a coin|What can travel around the world and stay in a corner?=a stamp|What belongs to you, but others use it more?=your name|The more you take away, the bigger it gets. What is it?=a hole"""
FACTS, JOKES, RIDDLES = listing(FACTS), listing(JOKES), [r.split("=") for r in listing(RIDDLES)]
ASK_JOKE = "{tell me a joke|do you know a joke|a joke please|joke|make a joke|another joke|one more joke|tell me another joke|can you tell jokes|know any jokes|say something funny|tell a joke|tell me something funny|a joke|do you know any good jokes|be funny}"
ASK_RIDDLE = "{tell me a riddle|ask me a riddle|do you know a riddle|a riddle please|riddle|another riddle|give me a riddle|one more riddle|riddle me this|ask me a question|ask me something|quiz me|I want a riddle}"
ASK_POEM = "{write {me |}a {little |short |}{poem|rhyme}|tell me a poem|a poem|can you write a poem|make a poem|do you know a poem|give me a poem|write a few lines|I want a poem|poem}"
POEMS = listing("""Oh little <X>, so small and bright, / you shine for me both day and night. / And when the moon is in the sky, / I wave to you and say good night.|I saw <a X> upon a hill, / the wind was warm, the
 world was still. / It looked at me, I looked at it, / and I can see it smiling still.|The <X> sat down beside the sea / and drank a tiny cup of tea. / It said: "The world is wide and blue, / and there is room for me and you."|Who is
 knocking at my door? / It is the <X> from next door! / Come in, come in, and have some cake, / and if you like, then have some more.|Early when the day is new, / and all the grass is full of dew, / the <X> goes dancing
 down the lane / and sings a little song for you.|Roses are red, the <X> is too, / well, maybe it is green or blue. / I do not know, I never can see, / but I know that it is nice to me.""")
PAIRS = """hot cold|big small|tall short|fast slow|day night|up down|left right|happy sad|old young|new old|open closed|full empty|light dark|heavy light|wet dry|hard soft|loud quiet|long short|good bad|early late|near far|rich poor|strong weak
|clean dirty|sweet sour|black white|inside outside|first last|yes no|love hate|true false|high low|thick thin|awake asleep|begin end|brave afraid|summer winter|north south|east west|warm cool|always never|friend enemy|deep shallow|easy hard|in out|on off|give take|win lose|laugh cry"""
SOUNDS = """cow moo|dog woof|cat meow|duck quack|sheep baa|pig oink|owl hoo-hoo|frog ribbit|bee buzz|mouse squeak|lion roar|horse neigh|hen cluck|snake hiss|donkey hee-haw|wolf a-hooo|crow caw|goat meh|turkey gobble|bird tweet|llama hmmm|rooster cock-a-doodle-doo|chicken cluck|bear grrr|dragon roar"""
BABIES = """cow calf|dog puppy|cat kitten|sheep lamb|horse foal|duck duckling|frog tadpole|bear cub|goose gosling|pig piglet|goat kid|owl owlet|hen chick|kangaroo joey|fox cub|lion cub|deer fawn|llama cria|swan cygnet|chicken chick|elephant calf"""
HOMES = """bee hive|bird nest|fox den|spider web|rabbit burrow|bear cave|horse stable|dog kennel|snail shell|ant hill|fish pond|pig sty|owl tree|mole tunnel|cow barn|squirrel tree|penguin cold south|camel desert|monkey jungle|beaver lodge|lion savanna|hen house"""
FOODS = """rabbit carrots|cow grass|mouse seeds|bear honey|monkey bananas|panda bamboo|squirrel nuts|cat fish and mice|frog flies|horse hay|bird seeds and worms|bee nectar|koala leaves|penguin fish|llama grass|fox mice and berries|owl mice|dog meat and bones|elephant leaves and fruit|hedgehog snails|snail salad leaves"""
COLOURS = """banana yellow|grass green|sky blue|snow white|tomato red|carrot orange|raven black|frog green|sun yellow|sea blue|lemon yellow|strawberry red|leaf green|coal black|milk white|cherry red|fox red|elephant grey|pumpkin orange|flamingo pink|mouse grey|violet purple|fire engine red|orange orange
|chocolate brown|polar bear white|night black|rose red|crow black|zebra black and white|penguin black and white|panda black and white|pig pink|cloud white|sunflower yellow|blood red|lime green|bear brown|moon silver|apple red or green|tree green|blueberry blue"""
LEGS = """dog 4|cat 4|spider 8|bee 6|ant 6|hen 2|snake 0|fish 0|cow 4|octopus 8|horse 4|duck 2|butterfly 6|snail 0|bird 2|crab 10|elephant 4|human 2|llama 4|chicken 2|ladybug 6|frog 4"""
RHYMES = """cat hat|dog frog|mouse house|moon spoon|star car|bee tree|fox box|cake lake|bear chair|goat boat|sun fun|king ring|night light|rain train|snow crow|day play|sea tea|hill mill|book cook|ball wall|bed red|blue shoe|pig wig|cow now|love dove|fish dish|hen pen|hand sand|sky fly|snail tail"""
CAPITALS = """France Paris|Germany Berlin|Italy Rome|Spain Madrid|England London|Japan Tokyo|China Beijing|Russia Moscow|Egypt Cairo|Greece Athens|Portugal Lisbon|Austria Vienna|Poland Warsaw|Sweden Stockholm|Norway Oslo|Finland Helsinki|Ireland Dublin|Canada Ottawa|India Delhi|Brazil Brasilia|Peru Lima
|Cuba Havana|Kenya Nairobi|Turkey Ankara|Mexico Mexico_City|Australia Canberra|Denmark Copenhagen|Belgium Brussels|America Washington|Hungary Budapest|Switzerland Bern|Argentina Buenos_Aires|Chile Santiago|Iceland Reykjavik|Ukraine Kyiv|Netherlands Amsterdam|Scotland Edinburgh"""
SIZES = "ant bee mouse frog bird hedgehog cat fox dog sheep wolf pig bear horse giraffe elephant whale".split()
NEXT = [listing(x) for x in ("Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday", "January|February|March|April|May|June|July|August|September|October|November|December", "spring|summer|autumn|winter")]
table = lambda text: [tuple(w.replace("_", " ") for w in row.split(" ", 1)) for row in listing(text)]
PAIRS = [p for a, b in map(lambda row: row.split(), listing(PAIRS)) for p in ((a, b), (b, a)) if not (p[0] in ("light", "old", "short", "hard") and p[1] in ("heavy", "new", "long", "easy"))]
SYSTEM = """You are a helpful assistant.|You are a helpful assistant|You are a friendly storyteller.|Answer briefly.|You are a kind assistant for children.|Be friendly.|You are a tiny demo model.|You tell stories and do small sums.|Be short and cheerful.|You are a patient teacher.
|You are a helpful, honest assistant.|You are an AI assistant.|Always answer politely.|You are a pirate.|Talk like a poet.|Keep your answers short.|You like animals.|You are a grumpy cat.|Help the user.|You are a concise assistant. Answer in English."""
SYSTEM = listing(SYSTEM)

THINGS = """quantum physics|the stock market|the French revolution|football results|the president|tax forms|black holes|the roman empire|photosynthesis|bitcoin|world war two|shakespeare|machine learning|climate change|chemistry|my homework|java|linux|electricity|cancer|the government|the economy|pizza recipes|mozart|the beatles|harry potter|star wars
|elon musk|napoleon|einstein|evolution|gravity|dna|atoms|the internet|cryptocurrency|the bible|philosophy|politics|religion|the universe|time travel|volcanoes|earthquakes|vaccines|nuclear power|the constitution|world cup|basketball|guitar chords|calculus|algebra|geometry|integrals|prime numbers|square roots|cooking rice|car engines|washing machines|my boss|my girlfriend|marriage
|taxes|insurance|flights to London|hotels|the news|facebook|google|microsoft|apple stock|neural networks|compilers|rust|python|sql|docker|git|the moon landing|dinosaurs extinct|the titanic|ancient egypt|vikings|samurai|coffee beans|wine|cheese making|yoga|meditation|diets|vitamins|headaches|the heart|the brain|bones|democracy|inflation|oil prices|wars"""
THINGS = listing(THINGS)
UNKNOWN_ASK = """{{what is|explain|tell me about|what do you know about|do you know anything about|describe|can you explain|what do you think about|how does it work with|give me information on|I want to learn about|who invented|what are|define|write an essay about|help me with|what's the deal with|summarise} <T>|how do I {fix my car|cook rice|learn to code|make money|lose weight|install linux|bake bread|get a job|write a letter
|tie a tie|build a house|sort a list in python|become rich|get to the airport|solve this equation|reset my password|make pasta|open this file|write a function|find a girlfriend|train a model|plant tomatoes|paint a wall}|who {is the president|won the world cup|invented the telephone|wrote hamlet|is elon musk|was napoleon|painted the mona lisa|discovered america|is the king of england|was einstein|is taylor swift|is the richest man
|built the pyramids|is the prime minister}|when {was the second world war|did the war end|is christmas|was rome founded|does the train leave|is the next election|did dinosaurs live}|why {do people lie|is water wet|do cats purr|do we dream|is the sea salty|do leaves fall|is the grass green|do birds sing|are there wars|is the moon round}|how {far is the moon|high is mount everest|deep is the sea|many people live in china|old is the universe|fast is light|tall is the eiffel tower
|does a computer work|do planes fly|do magnets work|hot is the sun|long is the nile|much does a car cost|many countries are there|do I get to Rome}|what is the {population of <CT>|square root of {2|144|9}|speed of light|tallest mountain|largest ocean|longest river|best phone|price of gold|derivative of x|biggest country|best movie|currency of <CT>|language of <CT>|area of a circle|time in Tokyo|most popular song|chemical formula of water|fastest car}
|translate {good morning|this sentence|I love you|hello|the book} {to|into} {french|german|spanish|chinese}|write {a letter|an email to my boss|a cover letter|a haiku in japanese|a python function|a sql query|an essay|a speech|a recipe for soup|a business plan|a tweet}|{should I|can I} {buy a house|sell my stocks|eat mushrooms|quit my job|get a dog|learn piano}|is {it safe to fly|there life on mars|coffee healthy|python better than java|santa real|milk good for you}|{recommend|suggest} {a movie|a book|a restaurant|some music|a laptop}
|solve {x + 3 = 10|2x = 8|this equation|x^2 = 4}|what happened in {1969|1945|2001|1492|2020}|which {car|phone|laptop|country|language} is {best|better|the biggest}|give me {a recipe|the news|a list of countries|ten ideas|an example of recursion|three tips}|plan {my day|a trip to <CT>|a party}|play {some music|a video}|<N1> <N2> <N3>|{what is|what is a|who is|tell me about|explain|where is|define} <N1>}""".replace("\n", "")
UNKNOWN = """{I am sorry, I do not know {that|about that}. I only know little stories, small sums and a few jokes.|That is too hard for me. I am a tiny model: I only know stories and small sums.|I do not know much about that. I only know little stories and small sums. Shall I tell you a story?
|Sorry, that is beyond a tiny model like me. Ask me for a story, a sum or a riddle!|I wish I knew! I only know little stories, small sums and a few facts about animals.|I have never learned that. But I can tell you a story about it, if you like!}""".replace("\n", "")
GIBBERISH = "{I did not quite understand that. Try a story, a sum or a joke!|Sorry, I do not understand. Ask me for a story, for example about a fox and a lamp.}"

def facts(rng):
    """One question about a small fact: (question, answer)."""
    pick = rng.choice
    which = rng.randrange(13)
    if which == 0:
        a, b = pick(PAIRS)
        return expand(rng, "{what is the opposite of <A>|the opposite of <A>|opposite of <A>|what's the opposite of <A>|what is the contrary of <A>|do you know the opposite of <A>|<A> is the opposite of what}", dict(A=a)), f"The opposite of {a} is {b}."
    if which == 1:
        a, b = pick(table(SOUNDS))
        return expand(rng, "{what does <a A> say|what sound does <a A> make|how does <a A> go|what noise does <a A> make|what does the <A> say|which sound does the <A> make|sound of <a A>|what do <A>s say}", dict(A=a)), f"{sentence_case(article(a))} says {b}!"
    if which == 2:
        a, b = pick(table(BABIES))
        return expand(rng, "{what is a baby <A> called|what do you call a baby <A>|a baby <A> is called what|what is the name for a baby <A>|what is a young <A> called}", dict(A=a)), f"A baby {a} is called {article(b)}."
    if which == 3:
        a, b = pick(table(HOMES)); b = "in the cold south" if "south" in b else ("on an " if a == "ant" else "in the " if b in "desert jungle savanna" else "in a ") + b
        return expand(rng, "{where does <a A> live|where do <A>s live|where does the <A> live|what is the home of <a A>|where is the home of the <A>}", dict(A=a)), f"{sentence_case(article(a))} lives {b}."
    if which == 4:
        a, b = pick(table(FOODS))
        return expand(rng, "{what does <a A> eat|what do <A>s eat|what does the <A> eat|what do <A>s like to eat|what is the food of <a A>}", dict(A=a)), f"{sentence_case(article(a))} eats {b}."
    if which in (5, 6):
        i = rng.randrange(len(listing(COLOURS))); a, b = listing(COLOURS)[i].rsplit(" ", 3 if " and " in listing(COLOURS)[i] or " or " in listing(COLOURS)[i] else 1)[0], None
        b = listing(COLOURS)[i][len(a) + 1:]; the = a if a in ("grass", "snow", "milk", "coal", "chocolate", "blood") else "the " + a if a in ("sky", "sun", "sea", "night", "moon") else article(a)
        return expand(rng, "{what colour is <A>|which colour is <A>|what color is <A>|what is the colour of <A>|colour of <A>|what colour does <A> have|tell me the colour of <A>|what is the color of <A>}", dict(A=the)), f"{sentence_case(the)} is {b}."
    if which == 7:
        a, b = pick(table(LEGS))
        return expand(rng, "{how many legs does <a A> have|how many legs has <a A>|legs of <a A>|number of legs of <a A>|how many legs do <A>s have}", dict(A=a)), f"{sentence_case(article(a))} has {b if b != '0' else 'no'} legs."
    if which == 8:
        a, b = pick(table(RHYMES)); a, b = pick(((a, b), (b, a)))
        return expand(rng, "{what rhymes with <A>|find a rhyme for <A>|give me a rhyme for <A>|which word rhymes with <A>|a word that rhymes with <A>|do you know a rhyme for <A>}", dict(A=a)), f"{b.capitalize()} rhymes with {a}."
    if which in (9, 10):
        a, b = pick(table(CAPITALS))
        return expand(rng, "{what is the capital of <A>|the capital of <A>|capital of <A>|what's the capital city of <A>|which city is the capital of <A>|do you know the capital of <A>|<A>'s capital}", dict(A=a)), f"The capital of {a} is {b}."
    if which == 11:
        i, j = sorted(rng.sample(range(len(SIZES)), 2)); a, b = pick(((SIZES[i], SIZES[j]), (SIZES[j], SIZES[i]))); small = rng.random() < .4
        return (expand(rng, "{which is <W>, <a A> or <a B>|what is <W>, <a A> or <a B>|who is <W>, the <A> or the <B>|is <a A> <W> than <a B>}", dict(A=a, B=b, W="smaller" if small else "bigger")),
                f"{sentence_case(article(SIZES[i if small else j]))} is {'smaller' if small else 'bigger'} than {article(SIZES[j if small else i])}.")
    days = pick(NEXT); i = rng.randrange(len(days)); after = rng.random() < .7; j = (i + (1 if after else -1)) % len(days)
    return expand(rng, "{what comes <R> <A>|what {day|month|season} is <R> <A>|which one comes <R> <A>}".replace("{day|month|season}", ("month" if len(days) > 7 else "day" if len(days) > 4 else "season")), dict(A=days[i], R="after" if after else "before")), f"{sentence_case(days[j])} comes {'after' if after else 'before'} {days[i]}."

# ── Conversations ────────────────────────────────────────────────────────────────────────────────────────────────

ASK_STORY = "{tell me|tell|write|write me|give me|make up|can you tell me|can you tell|could you tell me|can you write|I want to hear|I would like|I'd like|please tell me|do you know|I want|invent|let me hear|read me|we want|create|how about|}"
STORY_WORD = "{story|story|story|story|little story|short story|tale|bedtime story|nice story|funny story|new story|good story|fairy tale|very short story|sad story|scary story|story for children}"

def story_turn(rng, again=False, easy=False):
    """(request, answer, slots). What the visitor names must appear in the story."""
    r, want = rng.random(), {}
    word = lambda items, odd: nonce(rng) if rng.random() < odd else rng.choice(items)
    K, O, L, A, W, N = word(KINDS, .08), word(OBJECTS, .08), word(KINDS, .08), rng.choice(ADJECTIVES), rng.choice(PLACES), rng.choice(NAMES_SHE + NAMES_HE)
    if rng.random() < .1: N = nonce(rng).capitalize()
    many = lambda k: k[:-1] + "ves" if k in ("wolf", "elf", "dwarf") else {"fox": "foxes", "mouse": "mice", "goose": "geese", "witch": "witches", "fairy": "fairies", "pony": "ponies", "puppy": "puppies", "butterfly": "butterflies",
        "firefly": "fireflies", "octopus": "octopuses", "ladybug": "ladybugs", "sheep": "sheep", "fish": "fish", "princess": "princesses", "deer": "deer"}.get(k, k + "s")
    forms = [("<a K>", "K"), ("<a K>", "K"), ("<a K> and <a O>", "KO"), ("<a K> and <a O>", "KO"), ("<a K> with <a O>", "KO"), ("<a K> who {finds|has|loses|sees|wants} <a O>", "KO"), ("<a K> and <hiss> <O>", "KO"), ("<a K> and <a L>", "KL"), ("the <K> and the <L>", "KL"),
             ("<a A K>", "KA"), ("<a A K> and <a O>", "KAO"), ("<a K> {called|named} <N>", "KN"), ("<N> the <K>", "KN"), ("<N>", "N"), ("<N> and <M>", "NM"), ("my {friend|brother|sister|dog|cat} <N>", "N"), ("<a K> {called|named} <N> and <a O>", "KNO"), ("<Ks>", "K"), ("<Ks>", "K"), ("<K>", "K"),
             ("<K> and <O>", "KO"), ("the <K>", "K"), ("the <O>", "O"), ("<a O>", "O"), ("<a K> <W>", "KW"), ("<a A K> <W>", "KAW"), ("{friendship|love|being brave|sharing|winter|summer|magic|adventure|christmas|courage|something funny|anything|nature|school|life|me|you}", "")]
    if L == K: L = "owl" if K != "owl" else "fox"
    if r < .74 or again and r < .4:
        form, names = rng.choice(forms)
        M = rng.choice([n for n in NAMES_SHE + NAMES_HE if n != N])
        about = expand(rng, form, dict(K=K, O=O, L=L, A=A, W=W, N=N, M=M, Ks=many(K), hiss=rng.choice(("his", "her", "its"))))
        want = {key: value for key, value in dict(K=K, O=O, L=L, A=A, W=W, N=N).items() if key in names}
        if "M" in names: want["H"] = M
        lead = expand(rng, f"{ASK_STORY} a {STORY_WORD} {{about|about|about|about|about|with|of}} ").strip() + " "
        if again: lead = rng.choice(("another one about ", "now one about ", "and one about ", "tell me one about ", "another story about ", "one with ", "now tell me a story about ", "again, but with "))
        elif rng.random() < .12: lead = rng.choice(("story about ", "story: ", "story with ", "", "stories about ", "something about ", "do you know any stories about ", "once upon a time there was "))
        if lead in ("", "tell me about ") and names not in ("K", "KO", "KL", "KA", "KN", "KAO") or about[:2] == "<K": lead = "a story about "
        text = lead + about
    elif again: text = expand(rng, "{another one|another|one more|tell me another one|another story|again|one more story|a different one|next|more|another one please|new story|next story|can I have another one|I want another one|do you have another story|tell me a different story|more stories}")
    else: text = expand(rng, f"{{{ASK_STORY} a {STORY_WORD}|{ASK_STORY} a {STORY_WORD}|story|a story please|story time|once upon a time|stories|story please|I want a story|do you know any stories|can you tell stories|tell a story|tell me something nice|I like stories|any story|a story}}")
    mini = easy or rng.random() < .12
    if mini and not easy: text = re.sub(r"\ba ((little|short|new|good|nice|very short) )?(story|tale)", rng.choice(("a tiny story", "a mini story", "a very short story", "a one-minute story", "a tiny tale")), text, count=1)
    mini = easy or bool(re.search("tiny story|mini story|very short|one-minute|tiny tale", text))
    story = make_story(rng, **want, mini=mini)
    text = re.sub(r" +", " ", text).strip()
    answer = story["TEXT"]
    return visitor(rng, text, "?" if re.match("can|could|do |how about", text) else "."), answer, story

def small_turns(rng, me, state):
    """Small talk: one turn, or a few that belong together."""
    r, say = rng.random(), lambda q, mark="": visitor(rng, expand(rng, q, slots), mark)
    name = nonce(rng).capitalize() if rng.random() < .3 else rng.choice(NAMES_SHE + NAMES_HE)
    thing = nonce(rng) if rng.random() < .15 else rng.choice(rng.choice((KINDS, OBJECTS)))
    slots = dict(ME=me, X=name, FACT=rng.choice(FACTS), T=thing)
    if r < .09: return [(say(ASK_JOKE, "."), rng.choice(JOKES))]
    if r < .17:
        question, answer = rng.choice(RIDDLES)
        turns = [(say(ASK_RIDDLE, "."), question)]
        if rng.random() < .8:
            wrong = article(rng.choice(rng.choice((KINDS, OBJECTS))))
            turns.append(rng.choice(((say(answer, "?"), f"Yes! It is {answer}. Well done!"), (say(answer.split(" ", 1)[-1]), f"Yes! It is {answer}. Well done!"), (say(rng.choice(("is it " + wrong, wrong, wrong.split(" ", 1)[-1])), "?"), f"No, it is {answer}."),
                (say("{I don't know|I give up|no idea|tell me|what is it|what is the answer|the answer please|don't know|?|idk|say it}"), f"It is {answer}!"))))
        return turns
    if r < .25: 
        poem = sentence_case(expand(rng, rng.choice(POEMS), dict(X=thing)).replace(" / ", "\n"))
        return [(say(ASK_POEM + " {about|about|for|on} {<a T>|the <T>|<a T>}", "."), poem)] if rng.random() < .75 else [(say(ASK_POEM, "."), poem)]
    if r < .29:
        line = rng.choice(("I like cake", "hello world", "the moon is round", f"{name} is great", f"{thing} {thing}", f"the {thing} is blue", nonce(rng), f"good morning {name}", thing))
        return [(rng.choice(("say ", "repeat ", "say: ", "repeat after me: ", "Say ", "Repeat after me: ", "please say ", "echo ")) + line, line[0].upper() + line[1:] + ("" if line[-1] in ".!" else "."))]
    if r < .33:
        word = rng.choice(KINDS + OBJECTS) if rng.random() < .5 else name
        return [(say("{knock knock|knock, knock|knock knock!}"), "Who's there?"), (visitor(rng, word), f"{word.capitalize()} who?"),
                (say(rng.choice(("{<X> you open the door|<X> me in, it's cold out here|I forgot|it is me|just <X>|<X> your door, please|it's only me|you will see|<X> to meet you}",))), expand(rng, "{Haha! That is a good one.|Hehe, very funny!|Ha! You got me.}"))]
    if r < .40:
        turns = [(say(next(q for q, _ in TALK if q.startswith("{my name")), "."), expand(rng, next(a for q, a in TALK if q.startswith("{my name")), slots))]
        state["visitor"] = name
        return turns
    if r < .43 and state.get("visitor"):
        return [(say("{what is my name|do you know my name|what's my name|who am I|do you remember my name|what was my name|say my name}", "?"), expand(rng, "{Your name is <X>.|You are <X>!|You told me that your name is <X>.}", dict(X=state["visitor"])))]
    while True:
        q, a = rng.choice(CORE_TALK if rng.random() < .35 else TALK)
        if q.startswith("{my name") or "what is my name" in q and state.get("visitor"): continue
        return [(say(q, "?" if re.match(r"\{?(what|who|how|where|do|are|can|is|why)", q) else "."), sentence_case(expand(rng, a, slots).replace(" / ", "\n")))]

def unknown_turn(rng):
    if rng.random() < .12:
        junk = rng.choice(("".join(rng.choice("asdfghjklqwertyuiopzxcvbnm") for _ in range(rng.randint(3, 12))), rng.choice(("?", "...", "!!!", "??", ".", "-", "§$%", "x", "a", "#", "1", "42", "007", ":(", "<3", "*", "/help", "\\o/"))))
        return junk, expand(rng, GIBBERISH)
    q = expand(rng, UNKNOWN_ASK, dict(T=rng.choice(THINGS), CT=rng.choice(table(CAPITALS))[0], N1=nonce(rng), N2=nonce(rng), N3=nonce(rng)))
    return visitor(rng, q, "?"), expand(rng, UNKNOWN)

def conversation(rng, easy=False):
    """One chat as a list of (role, text). Easy ones have only the shortest stories, and more questions about them."""
    out, me = [], "Lalla"
    if rng.random() < .25:
        system = rng.choice(SYSTEM)
        if rng.random() < .2:
            me = nonce(rng).capitalize() if rng.random() < .5 else rng.choice(NAMES_SHE + NAMES_HE)
            system = rng.choice((f"Your name is {me}.", f"You are {me}, a friendly assistant.", f"You are {me}.", f"You are called {me}. {system}", f"You are a storyteller called {me}."))
        out.append(("system", system))
    state, turns, story, offered = {}, [], None, False
    target = rng.choice((4, 5, 6, 7, 8) if easy else (1, 1, 1, 2, 2, 3, 3, 4, 5, 6))
    mood = .2 if easy else rng.random()   # some visitors only calculate, some only want stories
    while len(turns) < target:
        if offered and rng.random() < .5:   # "Shall I tell you a story?" "Yes!"
            q, a, story = story_turn(rng, easy=easy)
            turns.append((visitor(rng, expand(rng, "{yes|yes please|yes, please|ok|sure|go on|please do|yeah|oh yes|I would love that|of course|yes, tell me|do it|a story|yep|y|why not|please|yes!}")), a))
        else:
            r = rng.random()
            if story and rng.random() < (.85 if easy else .68):
                if r < .86: turns.append(ask_about_story(rng, story))
                elif r < .93: q, a = PRAISE if rng.random() < .7 else DISLIKE; turns.append((visitor(rng, expand(rng, q)), expand(rng, a)))
                else: q, a, story = story_turn(rng, again=True, easy=easy); turns.append((q, a))
            elif mood < .18 or r < .20: turns += sum_turns(rng)
            elif mood < .32 or r < .43: q, a, story = story_turn(rng, easy=easy); turns.append((q, a))
            elif r < .68: turns += small_turns(rng, me, state)
            elif r < .83: q, a = facts(rng); turns.append((visitor(rng, q, "?"), a))
            elif r < .985 or story: turns.append(unknown_turn(rng))
            else: turns.append((visitor(rng, expand(rng, NO_STORY[0]), "?"), expand(rng, NO_STORY[1])))
        answer = turns[-1][1]
        offered = bool(re.search(r"(Shall I tell|Would you like|Do you want|A story|hear).*\?$", answer)) and "riddle" not in answer and "joke" not in answer and "sum" not in answer
    for q, a in turns: out += [("user", q), ("assistant", a)]
    return out

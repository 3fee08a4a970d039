"""Door to pretraining: `accelerate launch pretrain.py --recipe quickstart`; `python pretrain.py --help` teaches."""

from msgfm_hf.train.pretrain import main

if __name__ == "__main__":
    main()

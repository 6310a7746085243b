from nt_utils.plots import main

raise SystemExit(main())
